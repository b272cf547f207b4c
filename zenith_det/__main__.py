"""``python -m zenith_det train …`` is ``zenith-det train …``."""

from zenith_det.commands import main

if __name__ == "__main__":
    main()
