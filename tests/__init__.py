# A package of its own name: an editable checkout of Detectron2 puts its own `tests` package on the path, and that would
# be found before a folder without this file.
