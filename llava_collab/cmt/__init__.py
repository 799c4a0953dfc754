"""CMT-open: a seven-category benchmark and training set, generated from a seed out of freely licensed picture packages.

The categories are those of the CMT benchmark named by HyperLLaVA; the pictures, questions and numbers here are our own, so no
figure measured on this set may be compared with a published one. Only the generator lives in the repository, never its pixels.
"""

from llava_collab.cmt.build import build_cmt
from llava_collab.cmt.families import CATEGORIES
from llava_collab.cmt.shards import write_shards
from llava_collab.cmt.sheet import contact_sheet
from llava_collab.cmt.splits import SPLITS

__all__ = ["CATEGORIES", "SPLITS", "build_cmt", "contact_sheet", "write_shards"]
