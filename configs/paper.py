"""The paper's recipe at 8B, stage by stage, on its data: what to start, one command after the other.

    python -m alto_jax.data.doctor --paper --data data --mixture data/stage2.json          # is everything there?
    python -m tools.convert_torch_weights import --titok F --sam F runs/paper/titok
    python -m alto_jax.main --config=configs/paper.py:stage1   --workdir=runs/paper/stage1
    python -m alto_jax.main --config=configs/paper.py:stage1_5 --workdir=runs/paper/stage1_5
    python -m tools.convert_torch_weights import --internvl DIR --alto F runs/paper/internvl
    python -m alto_jax.main --config=configs/paper.py:stage2   --workdir=runs/paper/stage2
    python -m alto_jax.main --config=configs/paper.py:stage3   --workdir=runs/paper/stage3

These are `stage1.py:base`, `stage1_5.py:base`, `stage2.py:8b` and `stage3.py:8b` with the paper's data;
docs/hyperparameters.md has every value beside the paper's and its code's, or says that it is not stated. Not yet run.
Weights of the data sets in the mixture of stages 2 and 3 are not stated: all alike. `STAGE_debug` has the same data at
debug size.
"""

from configs import common, stage1, stage1_5, stage2, stage3

STAGES = {"stage1": stage1, "stage1_5": stage1_5, "stage2": stage2, "stage3": stage3}
SIZES = (*STAGES, *(f"{stage}_debug" for stage in STAGES))
_PAPER_SIZE = {"stage1": "base", "stage1_5": "base", "stage2": "8b", "stage3": "8b"}
# Note: stage 2 takes its mask tokenizer from stage 1.5, whatever --alto was.
_STARTS = {"stage1": {"init_from": "runs/paper/titok"}, "stage1_5": {"init_from": "runs/paper/stage1"},
           "stage2": {"init_from": "runs/paper/internvl", "tokenizer_from": "runs/paper/stage1_5"},
           "stage3": {"init_from": "runs/paper/stage2"}}  # fmt: skip


def get_config(stage=None):
    """The configuration of a stage, one of SIZES."""
    stage = common.check_size(stage, SIZES, "paper.py")
    name, is_debug = stage.removesuffix("_debug"), stage.endswith("_debug")
    config = STAGES[name].get_config("debug" if is_debug else _PAPER_SIZE[name])
    # What is evaluated in training is the validation list of SA-1B, and as many of the other images.
    if name in ("stage1", "stage1_5"):
        config.data.update({"source": "sa1b", "root": "data/sa1b", "validation_fraction": 0.002})
    else:
        # Note: requests of 20 boxes are longer than the 512 tokens of stage3.py.
        config.data.update({"source": "mixture", "meta": "data/stage2.json", "validation_fraction": 0.002,
                            "max_length": 320 if is_debug else 1024})  # fmt: skip
    if is_debug:
        config.data.max_targets = 3
    else:
        config.update(_STARTS[name])
    return config
