"""From a segmentor's logits to class probabilities, and from these to a label map.

A segmentor may say itself what its logits mean, by either of two members; any other's probabilities
are the softmax of its logits, at temperature 1:

``probabilities(logits_BKHW)``  probability of every class, (B, K, H, W)
``temperature``                 k > 0, a float: what it has divided its logits by, so that they may
                                be multiplied by it and divided by another
"""

from torch import Tensor, nn

from mlseg.precision import full


def temperature(segmentor: nn.Module) -> float:
    """What a segmentor has divided its logits by. It may be read from the device."""
    return float(getattr(segmentor, "temperature", 1.0))


def class_probabilities(segmentor: nn.Module, logits_BKHW: Tensor) -> Tensor:
    """(B, K, H, W) logits -> probability of every class, in float32 or wider."""
    own = getattr(segmentor, "probabilities", None)
    logits = full(logits_BKHW)
    return logits.softmax(1) if own is None else own(logits)


def decide(probabilities_BKHW: Tensor, threshold: float = 0.5) -> Tensor:
    """(B, K, H, W) class probabilities -> (B, H, W) class indices.

    Two classes: the foreground where its probability exceeds `threshold`. More: the most probable
    one, whatever the threshold.
    """
    if probabilities_BKHW.shape[1] == 2:
        return (probabilities_BKHW[:, 1] > threshold).long()
    return probabilities_BKHW.argmax(1)
