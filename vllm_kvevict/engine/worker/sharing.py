"""Which layers of a loaded model read the keys and values of others."""

from __future__ import annotations

from collections.abc import Sequence

from vllm.config import VllmConfig


def sharing_targets(vllm_config: VllmConfig, layer_names: Sequence[str]) -> dict[str, str]:
    """Return of each layer that reads the cache of one of ``layer_names`` which one that is, in the order of the model.

    Raises ValueError if such a layer has another softmax scale or soft-capping than its target, or sinks: their queries
    are scored together.
    """
    layers = vllm_config.compilation_config.static_forward_context
    names = set(layer_names)
    targets = {
        name: target
        for name, layer in layers.items()
        if (target := getattr(layer, "kv_sharing_target_layer_name", None)) in names
    }
    for name, target in targets.items():
        if layers[name].impl.sinks is not None:
            raise ValueError(
                f"--kv-eviction: layer {name} reads the keys of {target}, and has attention sinks, which does not work "
                f"together. Use another model, or leave --kv-eviction out"
            )
        ours, theirs = (
            {"softmax scale": layers[each].impl.scale, "soft-capping": layers[each].impl.logits_soft_cap or 0.0}
            for each in (name, target)
        )
        for what, given in ours.items():
            if given != theirs[what]:
                raise ValueError(
                    f"--kv-eviction: layer {name} reads the keys of {target} with a {what} of {given}, and that layer "
                    f"has {theirs[what]}; both must be the same. Use another model, or leave --kv-eviction out"
                )
    return targets
