"""Everything autosam_label computes, free of the server: importable in a notebook.

One shape alphabet holds in every docstring: ``B`` images, ``K`` classes, ``N = B*K`` (image, class) pairs, ``T`` prompt
tokens, ``E`` prompt width, ``M`` candidate masks, ``D`` slices, ``H W`` a slice, ``S`` the backbone's input side,
``h w = S/16`` the feature grid. A stored volume is indexed ``(i, j, k)``. A number never travels without its frame:
``_ijk`` voxel index of the stored array, ``_rc`` row and column of a slice, ``_xy`` backbone input pixels, ``_mm``
millimetres, ``_s`` seconds.
"""
