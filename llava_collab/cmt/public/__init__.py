"""CMT-public: the seven categories at the size that the article gives for CMT, assembled from public sets on the user's own disk.

HyperLLaVA (arXiv 2403.13447) trains on 505,405 instruction groups and tests on 1,149; neither its list of sources nor the data were
published. So this is a stand-in of the same size and the same seven category names, with its own split, and no figure measured on it
may be compared with the article's. Nothing is fetched and no picture is copied: `data build cmt-public` reads annotation files in
their published form, and its rows point at the user's pictures.
"""

from llava_collab.cmt.public.build import TEST_ITEMS, TRAIN_ITEMS, build_public

__all__ = ["TEST_ITEMS", "TRAIN_ITEMS", "build_public"]
