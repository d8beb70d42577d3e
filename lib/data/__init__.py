"""Images on their own voxel grid: reading, window, slice geometry, writing, the phantom and the data splits."""
