"""Questions of the paper asked of the small setting: one command each, RESULTS.md has the answers."""
