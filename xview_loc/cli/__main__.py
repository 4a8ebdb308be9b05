"""``python -m xview_loc.cli``."""

from xview_loc.cli import main

main()
