"""From documents to tokens and back: WordPiece, byte-level BPE, characters and bytes, and how each is trained."""
