"""Models: the modules that ship with every checkpoint, so that it loads without this library.

The folder is flat, and its modules import their neighbours by ``from .name import ...`` and nothing else of this
package: transformers copies them next to the weights and finds them by reading those lines.
"""
