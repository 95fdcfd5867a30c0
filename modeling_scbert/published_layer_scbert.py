"""What fused code of a whole block counts on: the published block, with nothing added to it."""

from torch import nn
from torch.nn.modules import module as of_all_modules
from transformers.activations import GELUActivation
from transformers.utils import output_capturing

# of a published `ScBertLayer`, in the order in which fused code takes them
WEIGHTS = (
    *("attention_norm.weight", "attention_norm.bias"),
    *("attention.q_proj.weight", "attention.k_proj.weight", "attention.v_proj.weight"),
    *("attention.o_proj.weight", "attention.o_proj.bias"),
    *("ffn_norm.weight", "ffn_norm.bias"),
    *("intermediate.weight", "intermediate.bias", "output.weight", "output.bias"),
)
# where torch keeps the hooks of a module, and behind "_global" those of all
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def what_was_added(layer: nn.Module) -> str | None:
    """
    How a FAVOR+ block differs from the published one in a way that fused code would miss, if it does.

    Examples
    --------
    >>> from scbert import ScBertConfig
    >>> from scbert.modeling_scbert.layers_scbert import ScBertLayer
    >>> what_was_added(ScBertLayer(ScBertConfig(), 0)), what_was_added(ScBertLayer(ScBertConfig(qkv_bias=True), 0))
    (None, 'its weights are not those of the published block')
    """
    if layer.training and (layer.dropout.p > 0 or layer.attention.dropout.p > 0):
        return "dropout is active"
    # without epsilon, a feature that underflows is a zero normaliser
    if layer.attention_norm.eps != layer.ffn_norm.eps or layer.attention.config.kernel_epsilon <= 0:
        return "its norms differ, or its kernel has no epsilon"
    if type(layer.activation) is not GELUActivation:
        return "its activation is not GELU"
    inner = [module for module in layer.modules() if module is not layer]
    kinds = {type(module) for module in inner if any(True for _ in module.parameters(recurse=False))}
    for_all = any(getattr(of_all_modules, f"_global{kind}") for kind in HOOKS)
    if kinds != {nn.Linear, nn.LayerNorm} or for_all or any(map(_is_changed, inner)):
        return "it has adapters or hooks"
    if tuple(name for name, _ in layer.named_parameters()) != WEIGHTS:
        return "its weights are not those of the published block"
    return None


def _is_changed(module: nn.Module) -> bool:
    """Whether a hook expects to be called, or another forward has been put in its place."""
    hooks = [hook for kind in HOOKS for hook in getattr(module, kind).values()]
    # those by which transformers records attentions stay for good, and do nothing where none are asked for
    added = any(getattr(hook, "__module__", None) != output_capturing.__name__ for hook in hooks)
    return added or "forward" in vars(module)
