"""Class names and colours of the scene data sets, as their benchmarks have them."""

Palette = tuple[tuple[int, int, int], ...]


def spread_palette(number: int) -> Palette:
    """Colours far apart: the bits of the index spread over red, green and blue.

    For 21 classes they are those of PASCAL VOC. Two classes are black and white.
    """
    if number == 2:
        return ((0, 0, 0), (255, 255, 255))
    colours = []
    for index in range(number):
        rgb = [0, 0, 0]
        for bit in range(8):
            rgb[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
        colours.append((rgb[0], rgb[1], rgb[2]))
    return tuple(colours)


# Told apart by all kinds of colour vision (Okabe and Ito 2008, "Color Universal Design"); the
# first, black, is the background's.
_OKABE_ITO: Palette = (
    (0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178),
    (213, 94, 0), (204, 121, 167),
)  # fmt: skip


def class_palette(number: int) -> Palette:
    """Colours for a user's own classes.

    Two are black and white. Up to eight are those of Okabe and Ito; then come these lighter and
    darker, then those of `spread_palette`, which not all eyes tell apart.
    """
    if number == 2:
        return spread_palette(2)
    shades = [
        tuple(round(value + part * (towards - value)) for value in rgb)
        for part, towards in ((0.6, 255), (0.5, 0))
        for rgb in _OKABE_ITO[1:]
    ]
    colours = dict.fromkeys([*_OKABE_ITO, *((r, g, b) for r, g, b in shades)])
    return tuple((colours | dict.fromkeys(spread_palette(255))).keys())[:number]


CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
    "bicyclist",
)  # fmt: skip
CAMVID_PALETTE: Palette = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
    (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
VOC_PALETTE = spread_palette(len(VOC_CLASSES))

CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
    "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train",
    "motorcycle", "bicycle",
)  # fmt: skip
CITYSCAPES_PALETTE: Palette = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
    (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
    (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
    (0, 80, 100), (0, 0, 230), (119, 11, 32),
)  # fmt: skip
CITYSCAPES_LABELS = {
    raw: index
    for index, raw in enumerate(
        (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
    )
}
"""The benchmark's 19 classes by the ids in ``*_labelIds.png``; all other ids don't count."""

STANFORD_CLASSES = (
    "sky", "tree", "road", "grass", "water", "building", "mountain", "foreground",
)  # fmt: skip
STANFORD_PALETTE: Palette = (
    (128, 160, 220), (128, 128, 0), (128, 64, 128), (0, 200, 0), (0, 0, 200), (128, 0, 0),
    (200, 100, 0), (255, 128, 0),
)  # fmt: skip
