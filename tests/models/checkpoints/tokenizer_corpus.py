"""Text on which tokenizers must agree: many scripts, code, emoji, white space, digits, and whatever else is odd."""

PROSE = """\
The foehn came down from the pass before noon, and by evening the snow on the roofs was gone.
She'd said they'll be late; I'm sure we've met, haven't we? It's what he'd've wanted.
DON'T SHOUT: I'VE HEARD YOU'RE LATE AND I'LL WAIT, WHO'S THERE? 'Tis nothing. rock'n'roll O'Brien
“Curly quotes,” he said — ‘and dashes’ … and an ellipsis. It’s not the ASCII apostrophe.
e.g. the U.S.A., Ph.D.s, C++20, .NET, node.js, 3-D, R&D, AT&T, and/or, 24/7, top-1, k-means
Der Föhn weht über Straße und Gässchen; Größe, Übermut, ẞ und ß. Donaudampfschifffahrtsgesellschaft
L'été, c'est-à-dire la saison où l'on mange des œufs à la coque, n'est-ce pas ? Ça va ; « où » ?
¿Dónde está el niño? ¡Qué sorpresa! Mañana será otro día, señor Núñez.
Não há açúcar no pão; amanhã às três e meia. Coração, avó, avô, à toa.
Però perché così tardi? È già lunedì, e la città è più lontana di quanto pensassi.
Zażółć gęślą jaźń. Pójdź, kińże tę chmurność w głąb flaszy! Łódź, ćma, źrebię.
Příliš žluťoučký kůň úpěl ďábelské ódy. Řeřicha, ťuhýk, ňadra.
Árvíztűrő tükörfúrógép; őrült űrhajós. Egy, kettő, három.
Fișierul și țara: ăîâ. Cei trei copii învață să citească.
Hạt gạo làng ta có vị phù sa. Nguyễn Thị Minh Khai, đường phố, ở đây.
İstanbul'da ılık bir gün; IĞDIR, şişe, çağ, öğün, güz.
Þetta er íslenska: æðardúnn, ýmis, öxl. Hvernig hefurðu það?
Sjöfartsmuseet på Åland; blåbærsyltetøy, rødgrød med fløde.
Tere hommikust, jõgi, süda, öö. Labrīt, ķīmija, ņemt, šūt, žņaugs.
Ni hao, wǒ jiào Lǐ Míng; nǚ, lǜ. Pīnyīn ā á ǎ à.
Съешь же ещё этих мягких французских булок, да выпей чаю. Ёлка, подъезд, вьюга.
Їжак їсть ґудзики, а Європа є. Щастя в об'єднанні.
Ѓорѓи и Ќиро џагорат; љубав, његов, ђак, ћуприја.
Ένα αστείο: «Πώς είσαι;» — Καλά, ευχαριστώ! Ἄνδρα μοι ἔννεπε, Μοῦσα.
Բարեւ ձեզ, ինչպե՞ս եք։ Շնորհակալություն։
გამარჯობა, როგორ ხარ? საქართველო, მთა და ბარი.
שלום עולם, מה שלומך היום? בְּרֵאשִׁית בָּרָא אֱלֹהִים
مرحبا بالعالم، كيف حالك؟ اللُّغَةُ العَرَبِيَّةُ جميلة. ١٢٣٤٥ و ٦٧٨٩٠
سلام دنیا، حالت چطور است؟ می‌خواهم نان بخرم. ۱۲۳
ہیلو دنیا، آپ کیسے ہیں؟ پاکستان میں بہار
नमस्ते दुनिया, आप कैसे हैं? क्षत्रिय, ज्ञान, श्री। १२३४
হ্যালো বিশ্ব, কেমন আছেন? আমার সোনার বাংলা।
ਸਤ ਸ੍ਰੀ ਅਕਾਲ ਦੁਨੀਆ; ਤੁਸੀਂ ਕਿਵੇਂ ਹੋ?
வணக்கம் உலகம், எப்படி இருக்கிறீர்கள்? தமிழ்நாடு
నమస్కారం ప్రపంచం, మీరు ఎలా ఉన్నారు?
ನಮಸ್ಕಾರ ಪ್ರಪಂಚ, ಹೇಗಿದ್ದೀರಾ? മലയാളം സംസാരിക്കുന്നു
ආයුබෝවන් ලෝකය. สวัสดีชาวโลก วันนี้อากาศดีมาก ๑๒๓
ສະບາຍດີຊາວໂລກ. မင်္ဂလာပါ ကမ္ဘာ။ សួស្តី​ពិភពលោក
བཀྲ་ཤིས་བདེ་ལེགས། ሰላም ለዓለም፣ እንዴት ነህ? ᎣᏏᏲ ᎡᎶᎯ ᓄᓇᕗᑦ
你好，世界！今天天气怎么样？我们在北京喝茶，吃饺子。二〇二六年十一月
繁體中文：臺灣的鐵路，龜、鬱、靈。「引號」與『書名』、頓號。
こんにちは、世界。今日はいい天気ですね！カタカナ・ひらがな・漢字ﾊﾝｶｸ。東京タワーへ行った。
안녕하세요 세계! 오늘 날씨가 어때요? 한국어 띄어쓰기는 어렵다. ㅋㅋㅋ ㅠㅠ
𠜎𠜱𠝹 rare ideographs; 𐍈𐌰𐌹 Gothic; 𒀀𒁀 cuneiform; 𓀀𓁐 hieroglyphs; 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛
Mixed: Привет, 世界 and שלום with عربي inside, naïve café résumé, ｆｕｌｌｗｉｄｔｈ ＡＢＣ １２３
ﬁne ﬂow oﬃce ĳ ŉ ǆ Ǆ ǅ ª º ² ³ ¹ ½ ⅓ ⅷ Ⅻ ① ⑳ ㊗ ㎏ № ℡ ™ Å ℵ""".splitlines()

CODE = r"""
def f(x: int, *args, **kwargs) -> dict[str, "T"]: return {k: v for k, v in kwargs.items() if k != "__doc__"}
    if not self._tokens[i:j] or (a <= b < c) and x**2 != y//3 % 7 << 1: raise ValueError(f"{x!r:>10.3f}")
	for (size_t i = 0; i < n; ++i) { sum += a[i] * b[i]; } // 1e-9f, 0xFF, 0b1010, 077L
#include <vector>	std::unordered_map<std::string, std::vector<int>> m{{"a", {1, 2}}};
const g = async ({a, b = [], ...rest}) => { await fetch(`https://x.y/${a}?q=${b}&z=1#top`); };
fn main() -> Result<(), Box<dyn Error>> { let s: &'static str = r#"raw"#; println!("{s:?}"); Ok(()) }
SELECT t1.*, COUNT(*) AS n FROM t1 LEFT JOIN t2 ON t1.id=t2.id WHERE name LIKE '%o''k%' GROUP BY 1;
<div class="a b" data-x='{"k": [1,2,3]}'>&nbsp;&lt;tag/&gt;<br/></div><!-- comment -->
{"key": "value", "n": -1.5e+10, "u": "\u00e9\n\t", "a": [null, true, false], "": {}}
\begin{align*} \int_0^\infty e^{-x^2}\,dx &= \frac{\sqrt{\pi}}{2} \\ \end{align*}
$ cat a.txt | grep -E '^[A-Za-z_]\w*$' | awk '{print $1}' > /dev/null 2>&1 && echo "done: $?"
C:\Users\me\file.txt ~/.config/x.yml ../../a/b.c user@example.com 192.168.0.1:8080 2026-11-28T15:04:05Z
snake_case camelCase PascalCase SCREAMING_CASE kebab-case dunder__init__ x1y2z3 HTTPServer2 iPhone17Pro
lambda: (yield) @decorator ... -> :: := => <=> !== ?. ?? |> <| ~= ^= %% // /* */ -- ++ && || !
func (s *S) M() (int, error) { defer close(ch); select { case v, ok := <-ch: return v, nil } }
class A<T extends Comparable<? super T>> implements B { @Override public int hashCode() { return 31 * h; } }
main = putStrLn $ map toUpper . filter (/= ' ') =<< getLine -- λx → x ∘ y ∀a ∃b ∈ ℝ ≠ ≤ ≥ ∑∏√∞
+++ b/x.py @@ -1,3 +1,4 @@ -old +new +newer""".strip("\n").split("\n")

EMOJI = [
    "👍 👍🏽 👍🏿 👋🏻 🤝🏼",
    "👨‍👩‍👧‍👦 👩🏽‍💻 🏳️‍🌈 🏴‍☠️ 🧑‍🤝‍🧑 ❤️‍🔥",
    "🇫🇷🇩🇪🇯🇵 🏴󠁧󠁢󠁳󠁣󠁴󠁿 1️⃣ #️⃣ ©️ ™️",
    "😀😃😄😁😆😅😂🤣😊😇 text😀text 😀.😀,😀!",
    "☀☁☂☃ ☀️ ☎️ ✈️ ♠♥♦♣ ★☆ ✓✗ → ← ↔ ⇒ ■□▪▫ ░▒▓",
    "¯\\_(ツ)_/¯ (╯°□°)╯︵ ┻━┻ ಠ_ಠ ʕ•ᴥ•ʔ",
    "🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙",
]

ODD = [
    "e\u0301 e\u0301\u0323 a\u030a o\u0308 n\u0303 \u0041\u030a \u212b \u1e9b\u0323 \uac00 \u1100\u1161 \u0fb2\u0f71",
    "Z\u0335\u0322a\u0338\u0321l\u0337\u0327g\u0336\u0328o\u0334\u032a",
    "zero\u200bwidth\u200cnon\u200djoiner\ufeffbom\u2060word\u00adsoft",
    "\u00a0no-break\u00a0 \u2003em \u2009thin \u3000wide \u202fnarrow \u205fmath \u1680ogham",
    "\u2028line\u2029paragraph\u0085next\x0bvertical\x0cform",
    "\u202eright to left\u202c \u2066isolate\u2069 \u061cmark",
    "\x00null \x01\x02\x07bell \x1b[31mred\x1b[0m \x7fdel \x80\x9fc1",
    "\ufffd replacement \ufffc object \ue000 private \U000f0000 \U0010fffd plane 16 \ufdd0 nonchar \U0010ffff",
    "▁lower ▁▁two ▁▁▁ one eighth block x▁y ▁",
    "<0x41> <0xE4> <0x0A> 0x41 <unk> <s> </s> <pad>",
    "[INST] <<SYS>> [PAD12] [EMPTY_3] <|unknown|> <|not a token <|im_end| <|im_end|>|>",
    "Ġhello Ċ ĉ ÃĤ Â\xa0 â€™ Ã©",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "abababababababababab aabaabaabaab aaabaaabaaab xyxyxyxyxyxyxyx",
    "------======________******........!!!!!!??????''''''\"\"\"\"\"\"``````",
    "((((((([[[[[[[{{{{{{{<<<<<<<>>>>>>>}}}}}}}]]]]]]])))))))",
    "nonononononono mississippi banana bananananana hahahahahaha",
    "a.b,c;d:e!f?g-h_i/j\\k|l~m`n@o#p$q%r^s&t*u+v=w",
    "'s's't're've'm'll'd 'S'T'RE'VE'M'LL'D ’s’t ''s 's' ' 'x '1",
    "I'M 'Re' we'Ve a'lL' ſ's 'ſ K'k K\u212a",
    "x" * 300,
    "supercalifragilisticexpialidocious" * 6,
]

DIGITS = [
    "0 1 12 123 1234 12345 123456 1234567 12345678 123456789 1234567890",
    "3.14159 -1.5e10 1,000,000.00 1'000 1_000_000 50% $3.50 €1.234,56 №5 #7",
    "007 0x1F 1st 2nd 3rd 4th x2 y10 z100a 1a2b3c v1.2.3-rc4 2026-11-28 15:04:05.678",
    "٠١٢٣٤٥٦٧٨٩ ۰۱۲۳ ०१२३४५ ๐๑๒๓ ０１２３４５６ 𝟎𝟏𝟐 ²³¹ ½⅓¾ ⅧⅫ ①②③ 一二三 ㉑",
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3",
]

SPACES = [
    "",
    *(" " * n for n in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 64, 100)),
    *(f"a{' ' * n}b" for n in range(2, 12)),
    *(f"{' ' * n}indent" for n in range(1, 10)),
    *(f"end{' ' * n}" for n in range(1, 6)),
    *("\n" * n for n in (1, 2, 3, 4, 8)),
    *("\t" * n for n in (1, 2, 3, 4)),
    "\r\n",
    "\r\n\r\n",
    "\r",
    "\n\r\n\r",
    "a\nb\n\nc\n\n\nd\r\ne\rf\n \ng \n h\t\ti\n\t\tj \t k",
    "  leading and trailing  ",
    "\n leading newline and space",
    "tab\tseparated\tvalues\t\n",
    " \t \n \r\n mixed \x0b \x0c ",
    "line one  \n  line two\n\n\n    line three\n",
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n",
    '{\n    "a": [\n        1,\n        2\n    ]\n}\n',
    "if x:\n\tif y:\n\t\treturn  z\n\n\n# end\n",
    "a \u3000 b\u3000\u3000c \u00a0\u00a0 d",
]


def corpus(*specials: str) -> list[str]:
    """All texts; with `specials` at their front, inside and behind, and beside each other."""
    texts = [*PROSE, *CODE, *EMOJI, *ODD, *DIGITS, *SPACES]
    texts += ["\n".join(PROSE[i : i + 5]) for i in range(0, len(PROSE), 5)]
    texts += [
        "+++ b/x.py\r\n@@ -1,3 +1,4 @@\r\n-old\r\n+new\r\n+newer\r\n",
        "\n".join(CODE),
        "\r\n".join(CODE),
        " ".join(EMOJI),
        "\t".join(DIGITS),
        "".join(ODD),
    ]
    for special in specials:
        texts += [special, special * 3, special[:-1], special[1:], special.upper()]
        texts += [f"{special}text", f"text{special}", f" {special} ", f"{special} \t\n  spaces"]
        texts += [f"a {special} b\n{special}\n c", f"é{special}世界{special}👍🏽"]
    texts += ["".join(specials), " ".join(specials), "x".join(specials)]
    return texts
