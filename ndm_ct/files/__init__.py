"""Files of data: tables, arrays and folders of images, read as rows; tables and pictures written."""

from ndm_ct.files.arrays import idx, levels_of_images
from ndm_ct.files.formats import read
from ndm_ct.files.images import pictures, write_picture
from ndm_ct.files.rows import Rows, blocks, let_go, spread_rows, with_bad_named
from ndm_ct.files.tables import TABLES, write_table

__all__ = [
    "TABLES", "Rows", "blocks", "idx", "let_go", "levels_of_images", "pictures", "read", "spread_rows",
    "with_bad_named", "write_picture", "write_table",
]  # fmt: skip
