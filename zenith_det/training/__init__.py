"""What any engine's training loop needs, in rooms: logs, processes, checkpoints, failures, the course of a run.

Nothing here knows an engine: no torchvision, no Detectron2.
"""
