"""Files that appear whole or not at all, as every room writes them."""

from nextgpu_node.files import Piece, check_writable, write_whole

__all__ = ["Piece", "check_writable", "write_whole"]
