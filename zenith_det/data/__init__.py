"""COCO-format data, engine-free: reading, checking and generating."""
