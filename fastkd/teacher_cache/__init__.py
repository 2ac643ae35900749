"""The teacher's answers on disk: what it says of each view of each image, so that it need not be asked twice.

rows.py      what is kept of the logits of an image: all of them, or the k largest and the rest
manifest.py  manifest.json: what the cache was made from; differences are named
files.py     the shards of a view, one row for each image, and which rows are filled
cache.py     TeacherCache: reads, writes, completes and verifies views
lessons.py   Lessons: what a trainer gives to each step, from the cache or from the teacher

A folder holds, for view v of the images, `view-v-00000.npy`, `view-v-00001.npy`, ... of up to 65,536 images each, which
`numpy.load(file, mmap_mode="r")` reads, and `view-v-filled.npy`, a byte for each image.
"""

from .cache import TeacherCache, verify
from .lessons import Lessons
from .manifest import Manifest
from .rows import Rows

__all__ = ["Lessons", "Manifest", "Rows", "TeacherCache", "verify"]
