"""Several optimizers and schedules on one config: run side by side, compared with their uncertainty."""
