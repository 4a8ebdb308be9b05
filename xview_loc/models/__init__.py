"""Cross-view localisation models behind one interface (:mod:`xview_loc.models.base`)."""
