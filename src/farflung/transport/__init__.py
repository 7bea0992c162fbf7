"""Links that carry frames between two node ids."""
