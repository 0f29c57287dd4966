"""`embed`: the main job. The same command again resumes, and again later embeds only what changed."""

from jobs import exits
from jobs.embed_flags import EmbedFlags
from jobs.flag_groups import takes_flags
from pipeline import head


@takes_flags
def embed(asked: EmbedFlags) -> None:
    """Classify and embed every image of the input, once, into plain Parquet.

    The same command resumes after a crash, and embeds only what changed when the input did.

    Example: shard2vec embed --input 'shards/*.tar' --output out --model pit_s_224 --weights random:0
    """

    def body() -> int:
        address, is_early = asked.ray, not asked.dry_run and head.is_early(asked.output)
        # While torch is imported Ray starts, or the cluster is asked.
        with head.reaching(address) if address else head.starting(is_early, max(0, asked.feeders or 0)):
            config = asked.run_config("embed")
            from pipeline.run import embed as run

            result = run(config, exits.say)
            exits.say(f"shard2vec: {result.message}")
            if asked.json:
                exits.print_json(result.json)
            return result.exit_code

    exits.run(body, asked.json)
