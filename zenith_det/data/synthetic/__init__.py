"""A synthetic COCO-format set: seeded, deterministic, any number of images, nothing to download.

Two tasks. ``instances`` draws textured, rotated, lit shapes of six classes that hide each other in front of
a cluttered background; ``keypoints`` draws articulated people-like figures with COCO's 17 keypoints. Both
have visible-part masks (polygons, compressed RLE, and uncompressed RLE for crowd regions), small objects,
crowd regions and a few images without objects, so that all that a real set asks of a reader is in them.

Image ``i`` of a split depends on the seed, the split, the size and ``i`` alone: a longer set begins with the
images of a shorter one. Images are PNG, so that the pixels are the same whatever decodes them.

How left differs from right on the figures: a figure seen from the front has a face and a shirt front, and its
left side is on the right of the picture; a figure seen from behind has neither, and its left side is on the
left. This survives a horizontal flip with left and right keypoints swapped, and only that: a code such as
"left limbs are red" would be contradicted by each flipped image.
"""

from zenith_det.data.synthetic.sets import TASKS, SplitFiles, draw_image, generate, split_files
from zenith_det.data.synthetic.sprites import SHAPE_NAMES

__all__ = ["SHAPE_NAMES", "TASKS", "SplitFiles", "draw_image", "generate", "split_files"]
