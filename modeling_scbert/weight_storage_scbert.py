"""Where weights lie in memory."""

from torch import nn


def align_weights(model: nn.Module, boundary: int = 64):
    """
    Copy CPU weights that start off a cache line, in place.

    Weights mapped from a safetensors file start wherever its header ends, and there matrix products take another
    path: the logits of a reloaded model differed in the last bit from those of the model that was saved.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % boundary:
            tensor.data = tensor.data.clone()
