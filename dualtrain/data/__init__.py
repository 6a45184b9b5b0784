"""From MDS shards to micro-batches, as a pure function of (recipe, step).

``dataset``     one split on disk: its facts, its checks, random access to documents
``plan``        which documents a stream holds at which token, epoch after epoch
``plan_files``  plans kept in files that the ranks of a node share
``batches``     stream positions -> tensors, for training and for the held-out split
``prefetch``    the same, in a background thread, ahead of the loop
``remote``      a dataset in an object store: its files, and a copy of its facts
``shard_cache`` its shards, fetched when they are read, in bounded space
``locks``       what processes of one machine agree by
"""
