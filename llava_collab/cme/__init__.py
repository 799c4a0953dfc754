"""CME-open: ten text-only tasks in the manner of CME, the instruction mix of TeamLoRA, out of labelled texts that ship in packages.

CME was not published; tasks, texts and wordings here are our own, so no figure measured on this set may be compared with a published
one. Only the builder lives in the repository, never a text.
"""

from llava_collab.cme.build import build_cme, table_of
from llava_collab.cme.tasks import TASKS

__all__ = ["TASKS", "build_cme", "table_of"]
