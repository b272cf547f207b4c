"""Run an exported detector with onnxruntime and NumPy alone: python run_onnx.py model.onnx image.npy"""

import json
import sys

import numpy as np
import onnxruntime


def detect(session, image):
    """Objects in an image, uint8 (H, W, 3) in the order that the metadata calls "channels": a dict of arrays."""
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"images": image[None]})))
    if "masks" in found:
        pasted = [paste(*one, *image.shape[:2]) for one in zip(found["masks"], found["boxes"])]
        found["masks"] = np.array(pasted, dtype=bool).reshape(-1, *image.shape[:2])
    return found


def paste(mask, box, height, width):
    """A mask's probabilities, which lie within its box, as a bool mask of the whole image."""

    def weights(start, end, pixels):
        at = (np.arange(pixels) + 0.5 - start) / (end - start) * len(mask) - 0.5
        return np.maximum(0, 1 - abs(at[:, None] - np.arange(len(mask))))

    return weights(box[1], box[3], height) @ mask @ weights(box[0], box[2], width).T >= 0.5


if __name__ == "__main__":
    session = onnxruntime.InferenceSession(sys.argv[1])
    about = json.loads(session.get_modelmeta().custom_metadata_map["zenith_det"])
    found = detect(session, np.load(sys.argv[2]))
    for index, score, box in zip(found["classes"], found["scores"], found["boxes"]):
        if score >= 0.5:
            print(f"{about['class_names'][index]} {score:.3f} {box.round(1).tolist()}")
