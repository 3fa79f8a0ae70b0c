from slmops.infra.reference.repetition import ends_in_repetition


def test_a_phrase_that_is_there_three_times_at_the_end_is_a_loop() -> None:
    phrase = list(range(10, 40))
    for looping in ([1, 2, 3, 7, 8, 7, 8, 7, 8], [5] * 6, [1, *phrase * 3], [1, *phrase * 3, *phrase[:7]]):
        assert ends_in_repetition(looping)
    for other in ([], [1, 2, 1, 2], [7, 8, 7, 8, 7, 8, 9], [5] * 5, [*phrase * 2, *phrase[:7]], list(range(300))):
        assert not ends_in_repetition(other)
