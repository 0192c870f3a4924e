"""The foundation of every other room: atomic files, progress, processes, device meshes, and the records that rooms share."""
