"""Pictures and pages of a run: its curves, its predictions beside the ground truth, what they say."""
