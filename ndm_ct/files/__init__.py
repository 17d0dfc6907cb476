"""Files of data: tables, arrays and folders of images, read as rows, and tables written."""

from ndm_ct.files.formats import Rows, read, write_table

__all__ = ["Rows", "read", "write_table"]
