"""The tree of brokers (TBON): who is whose parent, who is joined, who is alive, and the links between them."""
