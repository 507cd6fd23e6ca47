"""What an objective wants to see of an image (`Views`), and the batch that carries it.

A worker decodes once and cuts every crop (uint8); everything that does not decide *which pixels are read* (flip,
colour, blur, masks …) is drawn from the sample's key and applied in batches where the model is (`views.photo`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

from torch import Tensor


class Photo(NamedTuple):
    """Photometric operations of one crop, in torchvision's conventions; all probabilities are per image."""

    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.0
    gray_p: float = 0.0
    blur_p: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0


class Crop(NamedTuple):
    """`count` random resized crops of one kind, `size` pixels square."""

    name: str
    count: int
    size: int
    scale: tuple[float, float]  # share of the image area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"
    flip_p: float = 0.5
    photo: tuple[Photo | None, ...] = (None,)  # one for all crops of this kind, or one per crop


class Cells(NamedTuple):
    """Which patches of the crops of one kind show the chosen object; `views.objects.patches` is the rule."""

    name: str  # of the kind of crop
    grid: tuple[int, int]  # patches down and across
    shape: str = "exact"  # or "box": groups of neighbouring patches are filled to rectangles
    threshold: float = 0.25  # share of a patch that the object must cover; "box" takes any part
    margin: int = 0  # patches that a box grows by on each side


class Views(NamedTuple):
    """All crops of a sample. `place` decides where they lie (None = independently, `views.place.independent`)."""

    crops: tuple[Crop, ...]
    place: Callable | None = None
    cells: tuple[Cells, ...] = ()  # needs a place that chooses an object, `views.place.AroundObject`


class Batch(TypedDict, total=False):
    """One micro-batch. Crop-major tensors, so flatten(0, 1) is the reference implementations' order."""

    key: Tensor  # int64 [B]
    id: Tensor  # int64 [B] sample id in the source
    position: Tensor  # int64 [B] global position in the training stream
    label: Tensor  # int64 [B], -1: none
    crops: dict[str, Tensor]  # uint8 [n, B, 3, s, s]
    boxes: dict[str, Tensor]  # float32 [n, B, 4]: y0 x0 y1 x1 in the image, pixels, after snapping
    sizes: Tensor  # int64 [B, 2]: image height and width, pixels
    cells: dict[str, Tensor]  # uint8 [n, B, h, w]: 1 = the patch shows the chosen object
    has_object: Tensor  # bool [B]: an object was chosen, though not every crop may show it; there if `cells` is
    images: dict[str, Tensor]  # float32 [n, B, 3, s, s], added by `prepare`; flipped crops' boxes have x0 > x1
    mean: Tensor  # float [c]: what `prepare` normalised with, as is `std`
    std: Tensor
    events: list[Any]  # bad samples that were substituted (data.loader.Event); never reaches the device
