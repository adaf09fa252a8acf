"""The memory inside other libraries' training loops, a file each; each imports its library, so none is imported here.

`gradproj.integrations.lightning`, `gradproj.integrations.huggingface` and `gradproj.integrations.avalanche`.
"""
