"""From MDS shards to micro-batches, as a pure function of (recipe, step).

``dataset``     one split on disk: its facts, its checks, random access to documents
``units``       the unique subset, and what of it is shuffled
``plan``        which documents a stream holds at which token, epoch after epoch
``part_order``  the order of one part of a stream: four bytes a document
``plan_files``  plans kept in files that the ranks of a node share
``batches``     stream positions -> tensors, for training and for the held-out split
``prefetch``    the same, in a background thread, ahead of the loop
``remote``      a dataset in an object store: its files, and a copy of its facts
``shard_cache`` its shards, fetched when they are read; they stay
``token_bytes`` the bytes of text that each token stands for
``corpus``      what a recipe's dataset holds, as far as a dry run needs it
``mds``         all that is used of mosaicml-streaming
"""
