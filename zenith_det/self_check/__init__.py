"""Short checks of whether this machine trains as it should: what ``python -m zenith_det.env --check`` runs."""
