"""What every room stands on.

Files written whole, progress, processes, meshes of devices, and the records that rooms share.
"""
