"""Segmentation scores, per image and pooled, counted on the device.

metrics = SegmentationMetrics(num_classes=2)
for ids, image, mask in batches:
    metrics.update(segmentor(image).argmax(1), mask, ids)     # no host synchronisation
metrics.compute()["jaccard"]                                  # the only one
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from mlseg import parallel
from mlseg.errors import UserError
from mlseg.segmentation.surfaces import Apart, classes_apart

SCORES = (
    "jaccard",
    "dice",
    "accuracy",
    "sensitivity",
    "specificity",
    "precision",
    "thresholded_jaccard",
)
# The challenge of ISIC 2018 counts a segmentation below this Jaccard as failed (Codella et al.
# 2019, arXiv 1902.03368).
ACCEPTED_JACCARD = 0.65


def confusion_per_image(
    prediction_BHW: Tensor, target_BHW: Tensor, num_classes: int, ignore_index: int | None = None
) -> tuple[Tensor, Tensor]:
    """Count (truth, prediction) pairs of each image, on the device it lies on.

    Args:
        prediction_BHW: (B, H, W) class indices, any integer type.
        target_BHW: (B, H, W) class indices or the ignore index.
        num_classes: K.
        ignore_index: label of pixels that don't count, or None.

    Returns:
        (B, K, K) int64 counts, rows are the truth; and the number of pixels, a scalar tensor, whose
        label or prediction is no class (0 unless something is wrong); those are counted nowhere.
    """
    batch = len(target_BHW)
    target = target_BHW.reshape(batch, -1).long()
    prediction = prediction_BHW.reshape(batch, -1).long()
    known = (target >= 0) & (target < num_classes) & (prediction >= 0) & (prediction < num_classes)
    counted = known if ignore_index is None else known & (target != ignore_index)
    wrong = ~known if ignore_index is None else ~known & (target != ignore_index)
    # One spare bin per image takes the pixels that don't count. (`bincount` and boolean indexing
    # would have to ask the device for a size.)
    bins = num_classes * num_classes
    index = torch.where(counted, target * num_classes + prediction, bins)
    counts = torch.zeros(batch, bins + 1, dtype=torch.int64, device=target.device)
    counts.scatter_add_(1, index, torch.ones_like(index))
    return counts[:, :bins].reshape(batch, num_classes, num_classes), wrong.sum()


def confusion_by_threshold(
    foreground_HW: Tensor, mask_HW: Tensor, thresholds: Tensor, ignore_index: int | None = None
) -> Tensor:
    """The same for an image of two classes at every threshold of its foreground, in one count.

    Args:
        foreground_HW: (H, W) probability of class 1, which is predicted where it exceeds a
            threshold.
        mask_HW: (H, W) 0, 1 or the ignore index.
        thresholds: (T,) ascending, on the same device.
        ignore_index: label of pixels that don't count, or None.

    Returns:
        (T, 2, 2) int64 counts, rows are the truth.
    """
    above = torch.bucketize(foreground_HW.contiguous(), thresholds)  # how many it exceeds
    bins = len(thresholds) + 1
    index = (mask_HW.long() * bins + above).flatten()
    if ignore_index is not None:
        index = index[mask_HW.flatten() != ignore_index]
    histogram = torch.bincount(index, minlength=2 * bins).reshape(2, bins)
    positive = histogram.flip(1).cumsum(1).flip(1)[:, 1:]  # (2, T)
    negative = histogram.sum(1, keepdim=True) - positive
    return torch.stack([negative, positive], 2).transpose(0, 1)


def _ratio(part: Tensor, whole: Tensor, empty_agrees: Tensor) -> Tensor:
    """part / whole; where whole is 0: 1 if truth and prediction agree there, else 0."""
    return torch.where(whole > 0, part / whole.clamp_min(1), empty_agrees.to(part.dtype))


def class_scores(confusion_NKK: Tensor) -> dict[str, Tensor]:
    """Scores of every class against the rest, from (N, K, K) counts (rows are the truth).

    Returns (N, K) float64 tensors "jaccard", "dice", "sensitivity", "specificity", "precision" and
    the bool "present": the class occurs in the truth or the prediction. With a class's true
    positives TP, false positives FP, false negatives FN and true negatives TN:

        jaccard = TP / (TP + FP + FN)      dice        = 2 TP / (2 TP + FP + FN)
        precision = TP / (TP + FP)         sensitivity = TP / (TP + FN)
        specificity = TN / (TN + FP)

    One rule for 0 / 0: the score is 1 if truth and prediction agree that there is nothing to count
    (neither has the class; for the specificity, neither has a pixel outside it), else 0.
    """
    counts = confusion_NKK.double()
    hit = counts.diagonal(dim1=-2, dim2=-1)
    true, predicted = counts.sum(-1), counts.sum(-2)
    total = counts.sum((-2, -1))[..., None]
    neither = (true == 0) & (predicted == 0)
    everywhere = (true == total) & (predicted == total)
    rest = total - true - predicted + hit
    return {
        "jaccard": _ratio(hit, true + predicted - hit, neither),
        "dice": _ratio(2 * hit, true + predicted, neither),
        "sensitivity": _ratio(hit, true, neither),
        "specificity": _ratio(rest, total - true, everywhere),
        "precision": _ratio(hit, predicted, neither),
        "present": ~neither,
    }


def image_scores(confusion_NKK: Tensor) -> dict[str, Tensor]:
    """`SCORES` of N images, each with at least one counted pixel, from (N, K, K) counts.

    Returns (N,) float64 tensors: see `SegmentationMetrics`.
    """
    of_class = class_scores(confusion_NKK)
    present = of_class.pop("present").double()
    two = confusion_NKK.shape[-1] == 2
    values = {
        name: score[:, 1] if two else (score * present).sum(1) / present.sum(1)
        for name, score in of_class.items()
    }
    right = confusion_NKK.diagonal(dim1=1, dim2=2).sum(1).double()
    values["accuracy"] = right / confusion_NKK.sum((1, 2)).double()
    jaccard = values["jaccard"]
    values["thresholded_jaccard"] = jaccard.where(jaccard >= ACCEPTED_JACCARD, 0.0)
    return {name: values[name] for name in SCORES}


class SegmentationMetrics:
    """Accumulates confusion counts per image and turns them into scores.

    **Per image.** Two classes: the scores of the foreground, class 1. More classes: the mean over
    the classes present in the image's truth or prediction, the background among them. Accuracy: the
    share of pixels labelled rightly. Thresholded Jaccard: the image's Jaccard, or 0 where that is
    below 0.65. An image that has no foreground scores jaccard = dice = 1 if none is predicted, else
    0; the other scores follow the same rule (see `class_scores`), so none is ever NaN. Ignored
    pixels count nowhere; an image of nothing else has no score and is left out.

    **Distances**, if wanted: of each image the 95th percentile of the Hausdorff distance and the
    normalized surface Dice at two pixels, of the maps given; see `surfaces` for definitions and the
    rule for empty masks. They are computed on the host.

    **Over images.** The mean, and the sample standard deviation (0 for a single image).

    **Pooled.** Every score but the thresholded Jaccard and the distance, which mean something for
    an image only, from the confusion matrix summed over all images: of the foreground, or the mean
    over the classes that occur in truth or prediction; the Jaccard (IoU) of every class; and mIoU,
    its mean over the classes that the truth shows, the background among them, for two classes too.

    Args:
        num_classes: K, at least 2.
        ignore_index: label of pixels that don't count, or None.
        classes: K names, for the per-class keys; None names them 0 to K - 1.
        distances: whether HD95 and NSD are computed too; `update` then waits for the device.
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int | None = None,
        classes: Sequence[str] | None = None,
        distances: bool = False,
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"metrics need at least 2 classes, not {num_classes}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.classes = list(classes or map(str, range(num_classes)))
        if len(self.classes) != num_classes:
            raise ValueError(f"{len(self.classes)} class names for {num_classes} classes")
        self.distances = distances
        self.reset()

    def reset(self) -> None:
        """Forget every image."""
        self._counts: list[Tensor] = []
        self._wrong: list[Tensor] = []
        self._ids: list[str] = []
        self._distances: list[Apart] = []

    @torch.no_grad()
    def update(
        self, prediction_BHW: Tensor, target_BHW: Tensor, ids: Sequence[str] | None = None
    ) -> None:
        """Count a batch of label maps, without host synchronisation (but see `distances`).

        Args:
            prediction_BHW: (B, H, W) class indices.
            target_BHW: (B, H, W) class indices or the ignore index.
            ids: B names of the images; None numbers them as they come.

        ValueError if shapes or the number of ids differ.
        """
        if prediction_BHW.shape != target_BHW.shape or prediction_BHW.dim() != 3:
            raise ValueError(
                f"prediction {tuple(prediction_BHW.shape)} and target {tuple(target_BHW.shape)} "
                "must both be (B, H, W)"
            )
        if ids is None:
            first = len(self._ids)
            ids = [str(first + index) for index in range(len(target_BHW))]
        if len(ids) != len(target_BHW):
            raise ValueError(f"{len(ids)} ids for {len(target_BHW)} images")
        counts, wrong = confusion_per_image(
            prediction_BHW, target_BHW, self.num_classes, self.ignore_index
        )
        self._counts.append(counts)
        self._wrong.append(wrong)
        self._ids.extend(ids)
        if self.distances:
            maps = (m.cpu().numpy() for m in (prediction_BHW, target_BHW))
            self._distances += [
                classes_apart(predicted, true, self.num_classes, self.ignore_index)
                for predicted, true in zip(*maps, strict=True)
            ]

    def join(self) -> None:
        """Put together what several processes have counted, in their order."""
        if not parallel.several():
            return
        counts, wrong = ([t.cpu() for t in found] for found in (self._counts, self._wrong))
        everybody = parallel.gather((counts, wrong, self._ids, self._distances))
        self.reset()
        for counts, wrong, ids, distances in everybody:
            self._counts += counts
            self._wrong += wrong
            self._ids += ids
            self._distances += distances

    def confusion(self) -> Tensor:
        """(N, K, K) int64 counts of every image so far, rows are the truth, on the CPU.

        UserError if there is no image, or if labels were found that are no class.
        """
        if not self._counts:
            raise UserError("no images to score: the data set or split is empty")
        wrong = int(torch.stack(self._wrong).sum())
        if wrong:
            raise UserError(
                f"{wrong} mask pixels hold labels outside 0 to {self.num_classes - 1}: check the "
                "data set's classes and ignore_index"
            )
        return torch.cat(self._counts).cpu()

    def only(self, ids: Collection[str]) -> "SegmentationMetrics":
        """Those of some of the images, without counting again."""
        places = [place for place, name in enumerate(self._ids) if name in ids]
        part = SegmentationMetrics(
            self.num_classes, self.ignore_index, self.classes, self.distances
        )
        part._counts, part._wrong = [torch.cat(self._counts)[places]], list(self._wrong)
        part._ids = [self._ids[place] for place in places]
        if self.distances:
            part._distances = [self._distances[place] for place in places]
        return part

    def shown(self) -> list[str]:
        """Names of the classes that the truth shows."""
        pixels = self.confusion().sum((0, 2)).tolist()
        return [name for name, count in zip(self.classes, pixels, strict=True) if count]

    def _scores(self) -> tuple[list[str], dict[str, Tensor], Tensor]:
        confusion = self.confusion()
        total = confusion.sum((1, 2))
        scored = total > 0
        ids = [name for name, keep in zip(self._ids, scored.tolist(), strict=True) if keep]
        if not ids:
            raise UserError("no image to score: every pixel has the ignore index")
        confusion = confusion[scored]
        values = image_scores(confusion)
        if self.distances:
            apart = torch.tensor(self._distances, dtype=torch.float64)[scored]
            values |= {"hd95": apart[:, 0], "nsd": apart[:, 1]}
        return ids, values, confusion

    def counted(self) -> tuple[list[str], Tensor]:
        """Ids of the images that have a score, and their (N, K, K) int64 counts, on the CPU.

        UserError as of :meth:`confusion`, or if no image has one.
        """
        ids, _, confusion = self._scores()
        return ids, confusion

    def per_image(self) -> dict[str, dict[str, float]]:
        """Scores of every image by id: {"ISIC_0000001": {"jaccard": 0.7, ...}, ...}."""
        ids, values, _ = self._scores()
        columns = {name: value.tolist() for name, value in values.items()}
        return {
            image: {name: columns[name][row] for name in columns} for row, image in enumerate(ids)
        }

    def compute(self) -> dict[str, float]:
        """Every figure as a finite float in [0, 1], besides "images", their number, and "hd95".

        Keys: each of `SCORES` (mean over images) and with "_std"; "hd95" and "hd95_std" in pixels,
            "nsd" and "nsd_std", where wanted; "pooled_<score>"; "miou"; "iou_<class>" for each
            class of the pooled confusion matrix (1 for a class that never occurs).
        """
        _, values, confusion = self._scores()
        images = len(confusion)
        result: dict[str, float] = {"images": float(images)}
        for name, value in values.items():
            result[name] = float(value.mean())
            result[f"{name}_std"] = float(value.std()) if images > 1 else 0.0
        pooled = confusion.sum(0)[None]
        for name, value in image_scores(pooled).items():
            if name != "thresholded_jaccard":
                result[f"pooled_{name}"] = float(value)
        iou = class_scores(pooled)["jaccard"][0]
        result["miou"] = float(iou[pooled[0].sum(1) > 0].mean())
        for name, share in zip(self.classes, iou.tolist(), strict=True):
            result[f"iou_{name}"] = share
        return result
