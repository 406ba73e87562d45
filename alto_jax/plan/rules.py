"""The rules of the splits as applied to a configuration, as text: `plan --rules`."""

from typing import Any

import jax

from alto_jax.experiment import ExperimentConfig
from alto_jax.parallel import sharding
from alto_jax.plan import programs
from alto_jax.plan.types import GIB, Options


def describe_rules(config: ExperimentConfig, options: Options) -> str:
    """The rules as applied to a configuration: every parameter's shape, split, rule and bytes of one device."""
    sizes, state = programs.sizes_for_rules(config, options), programs.state_shapes(config)
    lines = [f"{'parameter':<72}{'shape':<26}{'split':<44}{'rule':>6}{'MiB a device':>14}"]
    total: dict[str, int] = {}
    for part, tree in (("trained", state.params), ("frozen", state.frozen)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = sharding.param_path(path)
            found = sharding.matching_rule(name, leaf.shape, sizes)
            rule, split = ("-", "whole") if found is None else (_rule_name(found), _split_name(found[2]))
            held = sharding.bytes_per_device({name: leaf}, sizes)
            total[part] = total.get(part, 0) + held
            lines.append(f"{name:<72}{leaf.shape!s:<26}{split:<44}{rule:>6}{held / 2**20:>14.3f}")
    total["optimizer"] = sharding.bytes_per_device(state.opt_state, sizes)
    lines.append("")
    lines += [f"{part + ', all of it':<72}{held / GIB:>10.3f} GiB a device" for part, held in total.items()]
    lines.append("\nrule n.m: the n-th of PARAM_RULES, its m-th split (1: the preferred one); -: no rule, replicated")
    lines.append(
        "\nactivations: " + "; ".join(f"{n} over {' x '.join(a)}" for n, a in sharding.ACTIVATION_RULES.items())
    )
    return "\n".join(lines)


def _rule_name(found: tuple) -> str:
    pattern, index, _ = found
    number = next(i for i, rule in enumerate(sharding.PARAM_RULES, 1) if rule[0] == pattern)
    return f"{number}.{index + 1}"


def _split_name(spec: Any) -> str:
    names = ["-" if e is None else e if isinstance(e, str) else "*".join(e) for e in spec]
    return ", ".join(names) if set(names) != {"-"} else "whole"
