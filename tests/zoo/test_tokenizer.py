from oa_train.tasks.encoding import PromptEncoder
from oa_train.zoo.tokenizer import word_tokenizer


def test_a_tokenizer_of_words_knows_them_and_no_others() -> None:
    tokenizer = word_tokenizer(["▁b", "▁B", "▁10"])
    assert tokenizer("10 b B c b")["input_ids"] == [5, 3, 4, 2, 3]
    assert tokenizer.decode([5, 3, 4]) == "10 b B"
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    encoder = PromptEncoder(tokenizer, 0, len(tokenizer))
    assert [encoder.is_single_token(word) for word in ("b", "10", "c")] == [True, True, False]
