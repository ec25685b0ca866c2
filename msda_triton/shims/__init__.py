"""Stand-ins for other packages' multi-scale deformable attention, one file for each; `patching.py` puts them in place.

A file here has the name, the arguments and the results of what it stands for, and imports nothing but torch and
`msda_triton`. Every function takes what the original takes and raises a ValueError or TypeError for another layout.
"""
