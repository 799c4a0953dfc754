"""From files to training batches: conversations become token ids and labels, images become tensors, batches resume where they stopped.

`conversation` builds ids and labels in one pass, `samples` reads data files, `images` opens pictures, `dataset`, `sampler` and
`collate` make batches, `skips` lists bad samples, `features` caches what a frozen vision tower sees, `check` judges a file before a run,
`real` reads the nine real sets, `texts` (with `mail`) the labelled texts of packages; `chance` draws by names alone. `shard_writer` packs a
file and its pictures into shards, `shards` reads them, from `places` near and
far, through a `shard_cache`. Import from the modules; this file stays empty so that light users don't pay for torch.
"""
