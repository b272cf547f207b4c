"""The keys that a training set decides: how many classes and keypoints there are."""

from __future__ import annotations

from collections.abc import Sequence

from zenith_det.config.finding import is_zoo_file
from zenith_det.config.loading import LoadedConfig
from zenith_det.errors import ConfigError

CLASS_KEYS = ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES")
KEYPOINT_KEY = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"


def follow_dataset(
    loaded: LoadedConfig,
    dataset: str,
    num_classes: int,
    num_keypoints: int,
    oks_sigmas: Sequence[float] = (),
) -> None:
    """Set the numbers of classes and keypoints to the training set's, over those of a file of the model zoo.

    Args:
        loaded: changed in place.
        dataset: its name, for messages.
        num_classes: of the training set.
        num_keypoints: per object; 0 where the set has none.
        oks_sigmas: of the keypoints, where the set gives them; a list in the config wins.

    Raises:
        ConfigError: a number that the user set contradicts the set; keypoints are asked for and there are none.
    """
    wanted = dict.fromkeys(CLASS_KEYS, (num_classes, "classes"))
    if loaded.cfg.MODEL.KEYPOINT_ON:
        if num_keypoints == 0:
            raise ConfigError(
                f"MODEL.KEYPOINT_ON is True{_from(loaded, 'MODEL.KEYPOINT_ON')}, but {dataset} has no keypoints: "
                "give a keypoint dataset, or a config without keypoints"
            )
        wanted[KEYPOINT_KEY] = (num_keypoints, "keypoints")
    # The number of classes of a head that the model doesn't have contradicts nothing.
    idle = CLASS_KEYS[0] if loaded.cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else CLASS_KEYS[1]
    for key, (number, what) in wanted.items():
        section, name = key.rsplit(".", 1)
        node = loaded.cfg
        for part in section.split("."):
            node = node[part]
        # Nobody can leave a key out of a file of Detectron2's model zoo, which means it for its own sets.
        given = key in loaded.sources and not is_zoo_file(loaded.sources[key])
        if given and key != idle and node[name] != number:
            raise ConfigError(
                f"{key} is {node[name]}{_from(loaded, key)}, but {dataset} has {number} {what}: leave the key "
                f"out, it follows the training set, or give {key} {number} at the end"
            )
        node[name] = number
    if loaded.cfg.MODEL.KEYPOINT_ON and oks_sigmas and not loaded.cfg.TEST.KEYPOINT_OKS_SIGMAS:
        loaded.cfg.TEST.KEYPOINT_OKS_SIGMAS = list(oks_sigmas)


def _from(loaded: LoadedConfig, key: str) -> str:
    return f" ({loaded.sources[key]})" if key in loaded.sources else ""
