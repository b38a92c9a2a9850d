import re

import numpy as np
import pytest


def test_zero_marks_latents_without_direction_in_encoder_or_decoder(dictionary):
    encoder, decoder = np.ones((6, 3)), np.ones((6, 3))
    encoder[1], decoder[2], encoder[3, 0], decoder[4, 2] = 0, 0, np.nan, np.inf
    assert dictionary(encoder, decoder).zero.tolist() == [False, True, True, True, True, False]


def test_live_counts_held_out_firings(dictionary):
    made = dictionary(np.ones((4, 2)), firing=[0, 9, 10, 11])
    assert made.live(10).tolist() == [False, False, True, True]
    assert made.live(1).tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoder": np.ones(3)}, "run-0: `encoder` must have shape [num_latents, d_in]; got [3]"),
        ({"decoder": np.ones((4, 2))}, "run-0: `decoder` must have the shape of `encoder` [4, 3]"),
        ({"firing": np.ones(4)}, "run-0: `firing` must be integers; got float64"),
        ({"firing": np.full(4, 1001)}, "between 0 and `held_out_tokens` (=1000); its values are"),
        ({"dead": np.zeros(3, bool)}, "run-0: `dead` must have one value per latent [4]; got [3]"),
        ({"dead": np.zeros(4)}, "run-0: `dead` must be true or false; got float64"),
        (
            {"variance": np.ones(3)},
            "run-0: `variance` must have one value per latent [4]; got [3]",
        ),
        ({"id": ""}, "`id` must not be empty"),
    ],
)
def test_impossible_values_are_refused(dictionary, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dictionary(**({"encoder": np.ones((4, 3))} | values))
