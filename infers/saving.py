"""Which answers may take the place of an image's final label: those that say as much as it does.

A final label is the truth that training learns from, and whatever it leaves out is background there. So nothing is
kept as final that is about one slice of a volume, or that lacks a structure of the label whose place it takes. Frame:
voxels of the image's file. Thread-safe: no state. Left out: whether the new voxels are better than the old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag

from infers.stored import label_map
from lib.data.samples import BACKGROUND, names_of
from lib.errors import CapacityError, PromptError, VolumeError
from lib.types import Volume

FINAL = DefaultLabelTag.FINAL.value
INSTEAD = (
    "Save it as draft, use a model that answers with all structures of all slices, such as sam2rad_edit, or correct"
    " the label in 3D Slicer and submit it there."
)


class FinalLabels:
    """What the final labels of a store must not lose.

    Args:
        open_image: path to volume.
        offered: names of the values 1..K in a stored label that declares none.
    """

    def __init__(self, open_image: Callable[[str], Volume], offered: Sequence[str]) -> None:
        self._open, self._offered = open_image, offered

    def check(self, store: Datastore, image: str, names: Collection[str], dimension: int) -> None:
        """Refuses an answer that may not be the image's final label.

        Args:
            store: of the image; a PACS is asked for its newest segmentation.
            image: identifier, which is the label's too.
            names: structures that the answer holds, with voxels or without.
            dimension: of the task; 2 answers about one slice ``k``.

        Raises:
            PromptError: with what to do instead, also where the stored label cannot be read.
            VolumeError: where the image cannot.
            MONAILabelException: where a PACS has a final label and does not hand it over.
        """
        volume = self._open(store.get_image_uri(image))
        if dimension == 2 and volume.shape[2] > 1:
            raise PromptError(
                f"save: expected an answer about all {volume.shape[2]} slices to keep as final label, received one of"
                f" a 2-D model, about one slice. {INSTEAD}"
            )
        lost = [name for name in self._stored(store, image, volume) if name not in names]
        if lost:
            raise PromptError(
                f"save: expected an answer with everything that the image's final label holds, for it takes its place;"
                f" received one with {sorted(names)}, without {lost}. {INSTEAD}"
            )

    def _stored(self, store: Datastore, image: str, volume: Volume) -> list[str]:
        """Structures with voxels in the final label; Slicer declares all segments, also those nobody has drawn."""
        file = store.get_label_uri(image, FINAL)
        if not file:
            return []
        declared = names_of(store.get_label_info(image, FINAL) or {})
        try:
            found = label_map(volume, Path(file), declared, self._offered)
        except (VolumeError, CapacityError) as error:
            raise PromptError(
                f"save: expected a final label that can be read, so that nothing of it is lost. {error}"
            ) from error
        names = [found.names[value] for value in np.unique(found.voxels).tolist() if value]
        return [name for name in names if name != BACKGROUND]
