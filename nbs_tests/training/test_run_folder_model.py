"""Two processes, and all that is done to the folders of their runs: never two writers, never a lost checkpoint."""

from nbs_tests.benchmarks.run_folder_model import check


def test_no_sequence_of_kills_moves_and_deletions_lets_two_write_or_loses_a_checkpoint():
    counts = check(range(40))
    tried = {what for what, _ in counts}
    assert tried >= {"begin", "resume", "move", "write", "save", "finish", "kill", "fork", "chdir", "disturb"}
    assert counts["save", "done"] > 20 and counts["save", "refused"] > 5
