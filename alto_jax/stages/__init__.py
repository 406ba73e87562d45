"""The four stages of training as thin modules on one loop."""
