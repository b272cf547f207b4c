"""What any engine's training loop needs: scalars, progress, checkpoints, logs, processes.

Nothing here knows an engine: no torchvision, no Detectron2.
"""
