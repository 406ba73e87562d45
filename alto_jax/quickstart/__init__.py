"""What `--config=configs/quickstart.py` runs: a tour of a shipped checkpoint, or all stages from nothing."""


def run(values: dict, workdir: str) -> dict:
    """Runs what a configuration of configs/quickstart.py asks for; returns what summary.json holds."""
    if values.get("checkpoint"):
        from alto_jax.quickstart import tour  # late: the two read different things

        return tour.run(values, workdir)
    from alto_jax.quickstart import training  # late: as above

    return training.run(values, workdir)
