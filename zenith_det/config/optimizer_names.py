"""Which values of ``SOLVER.OPTIMIZER`` belong together."""

#: They set the LR by the norms' history.
ZENITH_OPTIMIZERS = ("ZENITH", "ZENITHAdamW")
#: They make one update, with one state and LRs of one size.
SGD_OPTIMIZERS = ("SGD", "ZENITH")
ADAMW_OPTIMIZERS = ("AdamW", "ZENITHAdamW")
