"""Sketches on disk: shards written whole, a manifest, checksums; readers map them. `search` scans a store.

>>> import tempfile, torch
>>> from fastsft.store import Store, StoreWriter
>>> folder = tempfile.mkdtemp() + "/store"
>>> settings = dict(spec={"kind": "sjlt", "seed": 0}, size=64, format="int8", sources=["maths"], model={"name": "tiny"})
>>> with StoreWriter.create(folder, **settings) as writer:
...     writer.append(torch.ones(2, 64), ids=["a", "b"], sources=["maths", "maths"])
>>> store = Store.open(folder)
>>> len(store), store.ids(), store.rows(0, 1).data.shape
(2, ['a', 'b'], torch.Size([1, 64]))
"""

from fastsft.store._files import StoreError, write_whole
from fastsft.store.manifest import is_store
from fastsft.store.merge import merge
from fastsft.store.reader import Store
from fastsft.store.scan import Found, Hit, search
from fastsft.store.writer import StoreWriter, rank_folder

__all__ = [
    "Found",
    "Hit",
    "Store",
    "StoreError",
    "StoreWriter",
    "is_store",
    "merge",
    "rank_folder",
    "search",
    "write_whole",
]
