"""The words and sentences of the storybook: text alone, in the notation that storybook.py explains.

To extend it, add lines and run the tests, which check these: every choice shows in the text; a word after "a" starts
with a consonant's sound; the longest story still fits; no word is rare. What they cannot check: a story makes sense.
"""

GRAMMAR_TEXT = """
# A story: who lived where, one of six plots as a row of beats, the closing.

story
    <opening> <plot> the end .

plot
    # Something dear is lost, and an animal knows where it lies.
    <losing> <meeting> <plea> <finding> <thanks>
    # Something light is blown up high, and an animal that can get there fetches it.
    <flying> <caught> <offer> <rescue> <thanks>
    # A young animal has lost its mother.
    <stray> <soothing> <asking> <mother> <farewell>
    # A treat for somebody dear, and something that goes into it is missing.
    <planning> <missing> <bargain> <tasting> <crumbs>
    # Two friends and one toy.
    <toy_found> <quarrel> <advice> <sorry> <sharing>
    # A noise in the night.
    <noise> <fear> <courage> <visitor_seen> <care/$need.kind> <morning>


# The opening keeps hero and home.

opening
    3 * once upon a time there was a <trait> <child> who lived <home:home> .
    3 * once there was a <trait> <child> who lived <home:home> .
    2 * there once was a <trait> <child> . $hero.he lived <home:home> .
    2 * long ago , a <trait> <child> lived <home:home> .
    2 * far away , <home:home> , there lived a <trait> <child> .
    2 * <home:home> lived a <trait> <child> .
    2 * <hero:name> was a <trait> $hero.child who lived <home:home> .
    2 * <hero:name> lived <home:home> and loved to <pastime> .
    2 * this is a story about <hero:name> , a <trait> $hero.child who lived <home:home> .
    2 * have you heard of <hero:name> ? $hero.he lived <home:home> and loved to <pastime> .
    2 * a <trait> <child> lived <home:home> and loved to <pastime> .

child
    2 * girl named <hero:girl>
    2 * boy named <hero:boy>
    girl called <hero:girl>
    boy called <hero:boy>

name
    <girl>
    <boy>

girl | he=she, him=her, his=her, child=girl
    lily
    mia
    anna
    rosie
    ella
    clara
    ruby
    nora
    emma
    alice
    julia
    maya

boy | he=he, him=him, his=his, child=boy
    tom
    ben
    sam
    max
    leo
    finn
    jack
    oscar
    hugo
    peter
    david
    paul

trait
    2 * little
    kind
    brave
    cheerful
    curious
    shy
    clever
    quiet
    gentle
    merry
    friendly
    lively
    careful
    dreamy
    polite
    busy
    bold
    patient
    lonely
    sleepy

home
    2 * in a <snug> house | name=house, at=in
    2 * in a <snug> cottage | name=cottage, at=in
    in a <snug> cabin | name=cabin, at=in
    in a <snug> hut | name=hut, at=in
    in a <snug> tower | name=tower, at=in
    in a <snug> castle | name=castle, at=in
    in a <snug> lighthouse | name=lighthouse, at=in
    in a <snug> mill | name=mill, at=in
    on a <snug> boat | name=boat, at=on
    on a lonely farm | name=farm, at=on
    on a busy farm | name=farm, at=on
    above a bakery | name=bakery, at=in
    above a toy shop | name=shop, at=in

snug
    snug
    red
    white
    blue
    small
    tiny
    tall
    narrow
    crooked
    wooden
    round
    windy

pastime
    sing
    dance
    draw
    paint
    read
    whistle
    climb trees
    tell stories
    count the stars
    watch the clouds
    feed the birds
    build towers


# Times, places, people, animals and manners that several plots share.

weather
    2 * sunny
    2 * warm
    windy
    bright
    cold
    cool
    gray
    clear
    misty
    cloudy
    breezy
    quiet
    lovely

daytime
    2 * morning
    2 * afternoon
    2 * day
    tuesday
    friday
    saturday
    sunday
    spring morning
    summer day
    autumn afternoon

place
    4 * <place/green>
    3 * <place/woods>
    3 * <place/water>
    2 * <place/farm>

place/green | kind=green
    in the park | name=park
    in the meadow | name=meadow
    on the hill | name=hill
    in the garden | name=garden

place/woods | kind=woods
    in the forest | name=forest
    in the woods | name=woods
    in the orchard | name=orchard

place/water | kind=water
    by the river | name=river
    by the lake | name=lake
    by the pond | name=pond

place/farm | kind=farm
    in the farmyard | name=farmyard
    in the pasture | name=pasture

hide/green
    in the tall grass
    among the daisies
    beside the stone wall
    under a blackberry bush
    near the garden gate
    behind a big oak
    under a wooden bench
    next to a molehill

hide/woods
    in a hollow log
    among the roots
    beside a big mushroom
    under a fir tree
    near the old oak
    behind a fallen tree
    between the ferns
    next to a mossy rock

hide/water
    in a little boat
    among the wet stones
    beside the water lilies
    under a willow tree
    near the mill wheel
    behind a flat rock
    between the reeds
    next to the bridge

hide/farm
    in the hay
    among the pumpkins
    beside the tractor
    under an apple cart
    near the water trough
    behind the barn
    between two milk cans
    next to the scarecrow

relative
    grandmother
    grandfather
    mother
    father
    aunt
    uncle
    sister
    brother
    cousin

paint
    2 * red
    2 * blue
    green
    yellow
    purple
    pink
    white
    black
    silver
    golden
    striped

coat
    2 * brown
    2 * gray
    2 * white
    2 * black
    spotted
    striped
    golden
    silver

helper/green
    <coat> rabbit | name=rabbit
    <coat> dog | name=dog
    <coat> robin | name=robin
    <coat> mole | name=mole
    <coat> pony | name=pony

helper/woods
    <coat> fox | name=fox
    <coat> squirrel | name=squirrel
    <coat> owl | name=owl
    <coat> deer | name=deer
    <coat> hedgehog | name=hedgehog

helper/water
    <coat> duck | name=duck
    <coat> frog | name=frog
    <coat> otter | name=otter
    <coat> swan | name=swan
    <coat> beaver | name=beaver

helper/farm
    <coat> hen | name=hen
    <coat> goat | name=goat
    <coat> horse | name=horse
    <coat> pig | name=pig
    <coat> donkey | name=donkey

gladly
    happily
    gladly
    cheerfully
    warmly
    kindly
    gently
    tenderly
    merrily
    joyfully
    sweetly
    brightly
    with a smile

sadly
    sadly
    softly
    quietly
    shyly
    timidly
    unhappily
    gloomily
    in tears
    with a sigh

soon
    2 * soon
    finally
    at last
    before long
    in the end
    after a while

later
    that night
    that evening
    the next day
    a day later
    a week later
    on sunday
    after supper

always
    ever since
    since then
    after that
    from then on
    from that day on

snack
    a cookie
    a bun
    a carrot
    a pear
    a sandwich
    some berries
    some nuts
    some bread
    some cheese
    a bit of cake
    a bowl of milk

big
    big
    long
    warm
    tight
    happy
    little

true
    true
    good
    dear
    clever
    wonderful


# Lost: keeps thing, place and helper.

losing
    2 * one <weather> <daytime> $hero.he lost $hero.his <thing:treasure> <place:place> .
    one <weather> <daytime> $hero.he dropped $hero.his <thing:treasure> somewhere <place:place> .
    one <weather> <daytime> , <place:place> , $hero.his <thing:treasure> was suddenly gone .
    one <weather> <daytime> $hero.he fell asleep <place:place> and woke up without $hero.his <thing:treasure> .
    one <weather> <daytime> , while $hero.he was <busy> <place:place> , $hero.his <thing:treasure> disappeared .
    after a <weather> <daytime> <place:place> , $hero.he could not find $hero.his <thing:treasure> .
    $hero.his <relative> had given $hero.him a <thing:treasure> , but $hero.he lost it <place:place> .
    $hero.he loved $hero.his <thing:treasure> , but one <weather> <daytime> $hero.he forgot it <place:place> .

treasure
    <paint> ball | name=ball
    <paint> scarf | name=scarf
    <paint> doll | name=doll
    <paint> whistle | name=whistle
    <paint> marble | name=marble
    <paint> cap | name=cap
    <paint> ribbon | name=ribbon
    <paint> puppet | name=puppet
    <paint> bell | name=bell
    <paint> basket | name=basket
    <paint> lantern | name=lantern
    <paint> purse | name=purse
    <paint> mitten | name=mitten

busy
    playing
    dreaming
    resting
    running about
    humming a song
    chasing a butterfly

meeting
    a <helper:helper/$place.kind> saw $hero.his tears and asked , " why are you <sad> ? "
    $hero looked <everywhere> , until a <helper:helper/$place.kind> came by .
    $hero looked <everywhere> , but found only <junk> and a <helper:helper/$place.kind> .
    $hero found <junk> , but that was all . <soon> , a <helper:helper/$place.kind> came by .
    $hero sat down and cried , until a <helper:helper/$place.kind> came by .
    " what are you looking for ? " asked a <helper:helper/$place.kind> <gladly> .
    " why do you look so <sad> ? " asked a <helper:helper/$place.kind> <gladly> .
    " oh no ! " cried $hero . <soon> , a <helper:helper/$place.kind> came by .
    $hero was very <sad> . <soon> , a <helper:helper/$place.kind> came by .
    $hero went back to look for it and met a <helper:helper/$place.kind> .

everywhere
    everywhere
    high and low
    here and there
    for hours
    all day long
    again and again

sad
    sad
    unhappy
    worried
    gloomy
    upset
    lonely

junk
    a rusty key
    a broken cup
    a bent spoon
    a snail
    an old shoe
    two pebbles
    three acorns

plea
    " my $thing is gone , " said $hero <sadly> .
    " i lost my $thing , " said $hero <sadly> .
    " i miss my $thing , " said $hero <sadly> .
    " where is my $thing ? " asked $hero <sadly> .
    " have you seen my $thing ? " asked $hero <sadly> .
    " can you find my $thing ? " asked $hero <sadly> .
    " please find my $thing , " $hero begged <sadly> .
    $hero said <sadly> , " i want my $thing . "
    " i loved my $thing , " said $hero <sadly> .

finding
    2 * <soon> , they found the <dusty> $thing.name <hide/$place.kind> .
    <soon> , $hero saw the <dusty> $thing.name <hide/$place.kind> .
    the $helper.name looked <hide/$place.kind> , and there was the <dusty> $thing.name .
    " look <hide/$place.kind> , " said the $helper.name <gladly> , and there it was .
    " it is <hide/$place.kind> , " said the $helper.name <gladly> , and so it was .
    they found it together <hide/$place.kind> , <dusty> but whole .
    <soon> , the $helper.name pulled it out , <dusty> but whole .
    they looked <everywhere> , and there it was , <hide/$place.kind> .

dusty
    dusty
    muddy
    dirty
    wet
    damp
    sandy


# Shared by the plots in which an animal helps with a thing.
thanks
    <always> , $hero and the $helper were <best> friends .
    $hero thanked the $helper <gladly> and ran home to the $home.name .
    $hero gave the $helper <snack> and a <big> hug .
    $hero and the $helper shared <snack> and <chatted> until sunset .
    <later> , $hero brought the $helper <snack> .
    <later> , $hero told everyone $home.at the $home.name about the <good> $helper.name .
    <later> , $hero and the $helper <chatted> together <place_again> .
    " you are a <true> friend , " $hero told the $helper <gladly> .
    <always> , $hero never let go of the $thing.name again .
    " come to the $home.name for <snack> , " said $hero <gladly> .
    $hero carried the $thing back to the $home.name and <chatted> all the way .
    $hero and the $helper <chatted> with the $thing.name until supper .

place_again
    $place
    $home.at the $home.name

best
    best
    good
    close
    true

good
    good
    clever
    brave
    friendly
    wonderful
    kind

chatted
    talked
    sang
    danced
    played
    laughed
    whistled


# Stuck: keeps thing, place and helper.

flying
    2 * one <weather> <daytime> $hero.he played <place:place> with a <thing:flyer> .
    one <weather> <daytime> $hero.he took a <thing:flyer> outside and played <place:place> .
    $hero.his <relative> gave $hero.him a <thing:flyer> to play with <place:place> .
    every <weather> <daytime> $hero.he went to play <place:place> with a <thing:flyer> .
    one <weather> <daytime> $hero.he tried out a <thing:flyer> <place:place> .
    $hero.he ran about <place:place> one <weather> <daytime> with a <thing:flyer> .

flyer
    <paint> kite | name=kite
    <paint> balloon | name=balloon
    <paint> hat | name=hat
    <paint> paper plane | name=plane
    <paint> glider | name=glider
    <paint> handkerchief | name=handkerchief
    <paint> pinwheel | name=pinwheel
    <paint> parachute | name=parachute

caught
    a <wild> wind took it , and it got stuck <perch/$place.kind> .
    but a <wild> wind left it <perch/$place.kind> .
    <soon> , it got caught <perch/$place.kind> .
    but a <wild> wind came , and it landed <perch/$place.kind> .
    $hero let go , and it flew away and got stuck <perch/$place.kind> .
    " oh no ! " cried $hero . a <wild> wind had left it <perch/$place.kind> .
    a <wild> wind blew , and <soon> it hung <perch/$place.kind> .
    up and away it flew , until it sat <perch/$place.kind> .

wild
    wild
    strong
    sudden
    playful
    naughty
    stormy
    cheeky

perch/green
    in a tall tree
    on a high branch
    in the old oak
    on a lamp post
    in an apple tree
    on a bird house

perch/woods
    in a fir tree
    on a mossy branch
    high in a pine
    on a dead branch
    in a crooked tree
    in the tallest tree

perch/water
    in a willow tree
    on a tall post
    on the high bridge
    on the boat house
    on a mast
    on the mill roof

perch/farm
    on the barn roof
    in a pear tree
    on the windmill
    on the henhouse
    on the chimney
    on the scarecrow

climber
    <coat> crow | name=crow, go=fly, went=flew
    <coat> magpie | name=magpie, go=fly, went=flew
    <coat> sparrow | name=sparrow, go=fly, went=flew
    <coat> swallow | name=swallow, go=fly, went=flew
    <coat> stork | name=stork, go=fly, went=flew
    2 * <coat> squirrel | name=squirrel, go=climb, went=climbed
    <coat> kitten | name=kitten, go=climb, went=climbed
    <coat> monkey | name=monkey, go=climb, went=climbed

offer
    " i will help you , " said a <helper:climber> <gladly> .
    " do not cry , " said a <helper:climber> <gladly> . " i can $helper.go . "
    a <helper:climber> saw it and asked <gladly> , " shall i $helper.go up ? "
    <soon> , a <helper:climber> came . " i can get it , " it said <gladly> .
    " would you like some help ? " asked a <helper:climber> <gladly> .
    " dear <helper:climber> , " called $hero , " please $helper.go up for me ! "
    $hero called for help , until a <helper:climber> came by .
    luckily , a <helper:climber> felt sorry for $hero.him .
    " shall i get your $thing.name ? " asked a <helper:climber> <gladly> .
    $hero jumped <number> times , but only a <helper:climber> could reach it .

rescue
    it $helper.went up and pulled <quickly> , and down came the $thing .
    it $helper.went up , and <soon> it had the <dusty> $thing.name .
    it $helper.went up <quickly> and brought back the <dusty> $thing.name .
    the $helper.name $helper.went up <quickly> and pushed the $thing.name down .
    up it $helper.went <quickly> , and down came the <dusty> $thing.name .
    <soon> , the $helper.name came back with the $thing .
    <soon> , the <dusty> $thing.name was back in the hands of $hero .
    the $helper.name $helper.went to the top and tossed the $thing.name down <quickly> .
    " catch ! " called the $helper.name <gladly> , and down came the $thing.name .

quickly
    quickly
    bravely
    carefully
    boldly
    swiftly
    calmly
    silently
    eagerly


# Stray: keeps coat, baby and place.

stray
    2 * one <weather> <daytime> $hero.he found a <pitiful> <coat:coat> <baby:baby> <place:place/$baby.kind> .
    one <weather> <daytime> $hero.he met a <pitiful> <coat:coat> <baby:baby> <place:place/$baby.kind> .
    one <weather> <daytime> a <coat:coat> <baby:baby> sat all alone <place:place/$baby.kind> .
    on the way to school , $hero.he saw a <pitiful> <coat:coat> <baby:baby> <place:place/$baby.kind> .
    one <weather> <daytime> $hero.he heard a <coat:coat> <baby:baby> crying <place:place/$baby.kind> .
    one <weather> <daytime> a <pitiful> <coat:coat> <baby:baby> came up to $hero.him <place:place/$baby.kind> .

pitiful
    lost
    tiny
    frightened
    hungry
    wet
    shivering
    lonely
    tired
    muddy
    sleepy

baby
    duckling | mother=duck, kind=water
    gosling | mother=goose, kind=water
    lamb | mother=sheep, kind=green
    foal | mother=horse, kind=green
    bunny | mother=rabbit, kind=green
    kitten | mother=cat, kind=farm
    puppy | mother=dog, kind=farm
    piglet | mother=pig, kind=farm
    calf | mother=cow, kind=farm
    fawn | mother=deer, kind=woods
    cub | mother=bear, kind=woods
    owlet | mother=owl, kind=woods

soothing
    " do not be afraid , " said $hero <gladly> .
    " we will find your mother , " said $hero <gladly> .
    " come with me , " said $hero <gladly> .
    $hero wrapped $hero.his <wrap> around it .
    $hero gave it <snack> and a <big> hug .
    $hero dried its tears and gave it <snack> .
    " where is your mother ? " asked $hero <gladly> .
    " i am lost , " said the $baby <sadly> .
    " i want my mother , " said the $baby <sadly> .
    it could not find its mother , so $hero gave it <snack> .

wrap
    coat
    jacket
    scarf
    sweater
    shawl
    arms

asking
    <witness> told them to look <stand/$place.kind> .
    <witness> had seen its mother <stand/$place.kind> .
    " its mother is <stand/$place.kind> , " said <witness> <gladly> .
    they looked <everywhere> , and <soon> they heard a noise <stand/$place.kind> .
    " look <stand/$place.kind> , " said <witness> <gladly> .
    " have you looked <stand/$place.kind> ? " asked <witness> <gladly> .
    they asked <witness> for help and looked <stand/$place.kind> .
    they looked <everywhere> and even <stand/$place.kind> .

stand/green
    beside the stone wall
    near the garden gate
    behind a big oak
    under the apple trees
    by the rose bushes
    next to a bench

stand/woods
    beside a fallen tree
    near the old oak
    behind the fir trees
    under a tall pine
    by the stream
    next to a mossy rock

stand/water
    beside the water lilies
    near the mill wheel
    behind the reeds
    under a willow tree
    by the fishing boats
    next to the bridge

stand/farm
    beside the tractor
    near the water trough
    behind the barn
    under an apple tree
    by the haystack
    next to the stable

witness
    a farmer
    a fisherman
    a shepherd
    a painter
    a soldier
    a postman
    a sailor
    an old woman
    an old man

mother
    <soon> , they saw a big $coat $baby.mother with <kind_eyes> eyes .
    <soon> , a $coat $baby.mother kissed the $baby <gladly> .
    there stood a $coat $baby.mother with <kind_eyes> eyes .
    " my child ! " cried a $coat $baby.mother <gladly> .
    " there she is ! " cried the $baby <gladly> .
    " mother ! " cried the $baby and ran at once to a big $coat $baby.mother .
    <soon> , the $baby was safe beside a big $coat $baby.mother .
    <soon> , a $coat $baby.mother hurried to meet them <gladly> .
    " how i missed you ! " cried a $coat $baby.mother <gladly> .
    <soon> , the $baby and its mother <chatted> together .

kind_eyes
    kind
    sad
    tired
    dark
    worried

farewell
    the $baby.mother thanked $hero <gladly> and gave $hero.him <gift> .
    $hero waved goodbye <gladly> and walked home to the $home.name .
    <always> , the $coat $baby often visited $hero $home.at the $home.name .
    <always> , $hero and the $coat $baby were <best> friends .
    <later> , the $coat $baby brought $hero <gift> .
    <later> , $hero and the $baby <chatted> together <place_again> .
    " thank you , " the $coat $baby.mother told $hero <gladly> .
    " you have a <kind_heart> heart , " the $baby.mother told $hero <gladly> .
    the $coat $baby got a <big> hug , and $hero got <gift> .
    <later> , $hero told everyone $home.at the $home.name about the $coat $baby .

gift
    a smooth stone
    a long feather
    a sweet pear
    a shiny shell
    a yellow flower
    a lucky clover
    a golden leaf
    a silver coin

kind_heart
    kind
    good
    big
    brave
    warm


# Baking: keeps person, dish, stuff (which says who has it) and that seller's mood.

planning
    2 * one <weather> <daytime> $hero.he wanted to make a <dish:dish> for $hero.his <person:person> .
    one <weather> <daytime> $hero.he promised $hero.his <person:person> a <dish:dish> .
    one <weather> <daytime> $hero.his <person:person> wished for a <dish:dish> .
    $hero.his <person:person> was <ill> , so $hero.he decided to make a <dish:dish> .
    " i will make a <dish:dish> for my <person:person> , " $hero.he said one <weather> <daytime> .
    $hero.his <person:person> loved <dish:dish> , so one <weather> <daytime> $hero.he began to make some .

ill
    ill
    sad
    hungry
    coming to visit
    very tired
    in bed

person
    grandmother | he=she, him=her
    grandfather | he=he, him=him
    mother | he=she, him=her
    father | he=he, him=him
    aunt | he=she, him=her
    uncle | he=he, him=him
    teacher | he=she, him=her
    neighbor | he=he, him=him

dish
    3 * <sweet> cake | name=cake, kind=sweet, where=in the oven
    2 * <sweet> pie | name=pie, kind=sweet, where=in the oven
    <sweet> tart | name=tart, kind=sweet, where=in the oven
    2 * <savory> soup | name=soup, kind=savory, where=on the stove
    <savory> stew | name=stew, kind=savory, where=on the stove

sweet
    cherry
    chocolate
    lemon
    plum
    walnut
    honey
    ginger
    blueberry

savory
    tomato
    pumpkin
    mushroom
    bean
    fish

stuff/sweet
    flour | seller=miller
    eggs | seller=farmer
    milk | seller=farmer
    butter | seller=farmer
    sugar | seller=grocer
    cream | seller=farmer

stuff/savory
    salt | seller=grocer
    pepper | seller=grocer
    onions | seller=gardener
    carrots | seller=gardener
    potatoes | seller=farmer
    garlic | seller=gardener

missing
    " we have no <stuff:stuff/$dish.kind> , " $hero.he said <sadly> .
    " who took the <stuff:stuff/$dish.kind> ? " $hero.he asked <sadly> .
    but the <thief> had eaten all the <stuff:stuff/$dish.kind> .
    but $hero.his <borrower> had used up all the <stuff:stuff/$dish.kind> .
    but $hero.he looked <everywhere> and found no <stuff:stuff/$dish.kind> .
    but the <jar> for the <stuff:stuff/$dish.kind> was empty .

thief
    mice
    dog
    cat
    goat
    pig

borrower
    brother
    sister
    cousin
    friend

jar
    jar
    box
    basket
    bowl

bargain
    so $hero <chore/$stuff.seller> for the <mood:mood> $stuff.seller and got some .
    the <mood:mood> $stuff.seller gave $hero.him some , because $hero <chore/$stuff.seller> .
    " help me first , " said the <mood:mood> $stuff.seller , so $hero <chore/$stuff.seller> .
    $hero <chore/$stuff.seller> for the <mood:mood> $stuff.seller , who had plenty .
    so $hero <chore/$stuff.seller> , and the <mood:mood> $stuff.seller gave $hero.him <some> .
    $hero asked the <mood:mood> $stuff.seller for some and <chore/$stuff.seller> .
    the <mood:mood> $stuff.seller had <some> , and $hero <chore/$stuff.seller> for it .

mood
    old
    young
    kind
    good
    busy
    cheerful
    grumpy
    friendly
    jolly
    fat

chore/miller
    carried the sacks
    swept the mill
    oiled the wheel
    chased the rats

chore/farmer
    fed the hens
    brushed the cow
    cleaned the stable
    stacked the hay
    washed the tractor

chore/grocer
    swept the shop
    dusted the shelves
    washed the windows
    sorted the boxes

chore/gardener
    watered the roses
    pulled the weeds
    raked the leaves
    trimmed the hedge

tasting
    " this is the <finest> $dish.name in the world , " said $hero.his $person .
    <soon> , $hero.his $person ate <number> helpings of $dish .
    " what a <fine> $dish.name ! " cried $hero.his $person <gladly> .
    when $hero.his $person saw the $dish.name , $person.he <rejoiced> for joy .
    <soon> , $hero.his $person tasted the $dish and <rejoiced> for joy .
    " you are a <fine> cook , " said $hero.his $person <gladly> .
    the $dish.name was too <much> , but $hero.his $person ate <number> helpings .
    <soon> , the $dish.name was $dish.where , and the $home.name smelled <fine> .
    " who made this <fine> $dish.name ? " asked $hero.his $person <gladly> .

finest
    best
    finest
    greatest
    tastiest

number
    two
    three
    four
    five

rejoiced
    clapped
    laughed
    jumped
    sang
    danced
    cried

fine
    fine
    great
    wonderful
    lovely
    good

much
    hot
    thick
    dark
    rich
    sweet

crumbs
    there was even <some> left for the $mood $stuff.seller .
    <later> , $hero took <some> to the $mood $stuff.seller .
    <later> , the $mood $stuff.seller came to the $home.name with <snack> .
    <always> , $hero made a $dish every <week_day> .
    " next time we will make it together , " $person.he told $hero <gladly> .
    $hero got a <big> hug and promised to make another one <later_on> .
    $hero and $hero.his $person <chatted> $home.at the $home.name until bedtime .
    $hero was so <full> that $hero.he forgot to wash the dishes .
    $hero.his $person gave $hero.him a <big> hug and <gift> .

some
    some
    plenty
    enough
    a little

week_day
    tuesday
    friday
    saturday
    sunday

later_on
    soon
    on sunday
    the next day
    in the spring

full
    happy
    proud
    tired
    full


# Sharing: keeps friend, thing and place.

toy_found
    2 * one <weather> <daytime> $hero.he and $hero.his <companion> <friend:friend> found a <thing:toy> <place:place> .
    $hero.his <companion> <friend:friend> came to play <place:place> , and they found a <thing:toy> .
    $hero.he played <place:place> with <friend:friend> one <weather> <daytime> and found a <thing:toy> .
    $hero.his <relative> gave $hero.him and $hero.his <companion> <friend:friend> a <thing:toy> to share <place:place> .

companion
    3 * friend
    cousin
    neighbor
    classmate

friend
    <friend_girl>
    <friend_boy>

friend_girl | his=her
    lucy
    grace
    sophie
    zoe
    hannah
    olivia

friend_boy | his=his
    noah
    theo
    jake
    adam
    daniel
    simon

toy
    <paint> wagon | name=wagon, use=ride, used=rode
    <paint> scooter | name=scooter, use=ride, used=rode
    <paint> bicycle | name=bicycle, use=ride, used=rode
    <paint> sled | name=sled, use=ride, used=rode
    <paint> drum | name=drum, use=play, used=played
    <paint> trumpet | name=trumpet, use=play, used=played
    <paint> flute | name=flute, use=play, used=played
    <paint> guitar | name=guitar, use=play, used=played
    <paint> kite | name=kite, use=fly, used=flew

shouted
    shouted
    cried
    yelled
    called
    screamed

crossly
    crossly
    angrily
    wildly
    rudely
    fiercely
    stubbornly

advice
    <elder> came and asked them , " why not share ? "
    " good friends share , " said <elder> <gladly> .
    " a $thing.name is more fun for two , " said <elder> .
    " a friend is worth more than a $thing.name , " said <elder> .
    " you can both $thing.use it , " said <elder> <gladly> .
    " take turns ! " said <elder> <gladly> .
    " will you not share ? " asked <elder> <gladly> .
    <elder> heard them and looked very <sad> .
    <soon> , they were both <sad> , until <elder> made peace .

elder
    <witness>
    a gardener
    a teacher
    a policeman

quarrel
    3 * " <mine> ! " <shouted> $hero <crossly> . " <no_mine> ! " <shouted> $friend .
    2 * " <mine> ! " <shouted> $hero . but $friend only pulled <crossly> .
    2 * " let go ! " $hero and $friend <shouted> , and pulled <crossly> .
    " i will $thing.use it first ! " <shouted> $hero <crossly> , and $friend <shouted> too .
    $hero and $friend both wanted to $thing.use it and <shouted> <crossly> .
    $friend took it , and $hero <shouted> <crossly> , " <mine> ! "

mine
    it is mine
    i saw it first
    give it to me
    let me have it
    this is my $thing.name

no_mine
    no , it is mine
    no , me first
    i want it too
    you always go first
    i had it first

sorry
    " i am sorry , " said $hero <sadly> .
    " you may go first , " $hero told $friend <sadly> .
    $hero gave $friend <snack> and said <sadly> , " sorry . "
    " let us take turns , " $hero told $friend <gladly> .
    " friends again ? " asked $hero <sadly> , and $friend laughed .
    $friend held out $friend.his hand , and $hero took it <gladly> .
    <soon> , $hero and $friend shook hands <gladly> .
    " you are still my friend , " said $hero <sadly> .
    " let us share the $thing.name , " said $friend <gladly> .

sharing
    <always> , $hero and $friend were <best> friends and shared the $thing .
    they $thing.used it together until <sunset> .
    <always> , $hero and $friend $thing.used the $thing together .
    <later> , they took the $thing to the $home.name and <chatted> together .
    <later> , $hero and $friend had <supper> $home.at the $home.name .
    $friend gave $hero a <big> hug and <snack> .
    <later> , they $thing.used the $thing <place_again> .
    they <chatted> and $thing.used it until <sunset> .
    $friend gave $hero <gift> and let $hero.him $thing.use the $thing.name .

sunset
    sunset
    supper
    the stars came out
    the sun went down over the $place.name

supper
    pancakes
    noodles
    soup
    cocoa
    cake


# Night: keeps noise, helper and need.

noise
    2 * one <dark> night $hero.he heard <noise:sound> .
    on a <dark> night , <noise:sound> woke $hero.him up .
    one <dark> night there came <noise:sound> .
    $hero.he lay in bed one <dark> night and heard <noise:sound> .
    one <dark> night $hero.he woke up from <noise:sound> .
    $hero.he could not sleep one <dark> night because of <noise:sound> .

dark
    dark
    stormy
    rainy
    moonlit
    cold
    snowy
    windy
    quiet
    misty

sound
    a <strange> <knock> at the door | kind=door
    a <strange> <tapping> at the window | kind=window
    a <strange> <squeak> under the bed | kind=bed
    a <strange> <creak> in the attic | kind=attic
    a <strange> <clatter> in the kitchen | kind=kitchen

strange
    strange
    soft
    loud
    funny
    sudden
    faint

knock
    knock
    scratching
    thump

tapping
    tapping
    flutter
    rattle

squeak
    squeak
    rustle
    snuffle

creak
    creak
    flapping
    scurrying

clatter
    clatter
    crash
    clink

fear
    " is it a <monster> ? " $hero.he asked <nervously> .
    $hero.he thought it was a <monster> .
    $hero.he was afraid of a <monster> .
    $hero.he pulled the blanket over $hero.his <head> .
    $hero.he hid $hero.his <head> under the pillow .
    " who is there ? " $hero.he asked <nervously> .
    $hero.he hugged $hero.his <pillow> and listened <nervously> .
    $hero.his <knees> began to shake .

nervously
    softly
    quietly
    timidly
    fearfully
    nervously
    silently
    anxiously

monster
    monster
    ghost
    dragon
    giant
    witch
    robber
    pirate

head
    head
    nose
    ears
    eyes

pillow
    pillow
    doll
    teddy bear
    knees

knees
    knees
    hands
    legs

courage
    2 * but then $hero took a <lamp> and went to look .
    but $hero got up <quickly> and lit a <lamp> .
    $hero tiptoed closer <quickly> with a <lamp> .
    <soon> , $hero took a deep breath and lit a <lamp> .
    <soon> , $hero got up to see what it was .
    $hero counted to <number> and climbed out of bed <quickly> .
    but $hero wanted to know , and got up <quickly> .
    " i am brave , " whispered $hero , and lit a <lamp> .

lamp
    lamp
    candle
    lantern
    torch

visitor/door
    <coat> dog | name=dog
    <coat> hedgehog | name=hedgehog
    <coat> goat | name=goat
    <coat> donkey | name=donkey
    <coat> fox | name=fox

visitor/window
    <coat> owl | name=owl
    <coat> crow | name=crow
    <coat> pigeon | name=pigeon
    <coat> parrot | name=parrot

visitor/bed
    <coat> mouse | name=mouse
    <coat> puppy | name=puppy
    <coat> kitten | name=kitten
    <coat> hamster | name=hamster

visitor/attic
    <coat> bat | name=bat
    <coat> swallow | name=swallow
    <coat> squirrel | name=squirrel
    <coat> dove | name=dove

visitor/kitchen
    <coat> cat | name=cat
    <coat> mouse | name=mouse
    <coat> raccoon | name=raccoon
    <coat> pig | name=pig

visitor_seen
    2 * it was only a <helper:visitor/$noise.kind> , <need:need> .
    there sat a <helper:visitor/$noise.kind> , <need:need> .
    and what was it ? a <helper:visitor/$noise.kind> , <need:need> !
    two <bright> eyes looked at $hero.him . it was a <helper:visitor/$noise.kind> , <need:need> .
    how $hero.he laughed ! it was just a <helper:visitor/$noise.kind> , <need:need> .

bright
    big
    bright
    sad
    round
    green

need
    2 * shivering with cold | kind=cold
    wet and cold | kind=cold
    2 * thin and hungry | kind=hungry
    looking for food | kind=hungry
    all alone | kind=lonely
    far from home | kind=lonely
    afraid of the dark | kind=afraid
    trembling with fear | kind=afraid

care/cold
    $hero wrapped it in a warm <cloth> .
    $hero put some wood on the fire .
    $hero let it sit <near_fire> .
    " come and get warm , " said $hero <gladly> .
    $hero gave it a warm <cloth> and <snack> .

cloth
    blanket
    towel
    scarf
    shawl

near_fire
    beside the stove
    near the fire
    under a blanket

care/hungry
    2 * $hero gave it <snack> .
    $hero fetched <snack> , and it ate every bit .
    " you must eat something , " said $hero <gladly> .

care/lonely
    $hero told it a story about a <monster> .
    " you are not alone any more , " said $hero <gladly> .
    $hero and the $helper.name played <game> together .
    $hero and the $helper.name <chatted> for a long time .
    $hero gave it <snack> and a <big> hug .

game
    cards
    checkers
    ball

care/afraid
    $hero sang it a song and lit another <lamp> .
    " nobody will hurt you here , " said $hero <gladly> .
    $hero showed it the <sky> and gave it <snack> .
    $hero counted sheep with it <gladly> .

sky
    stars
    moon
    clouds

morning
    <soon> , $hero and the $helper were fast asleep .
    <always> , no <monster> $home.at the $home.name could scare $hero .
    <always> , $hero and the $helper were <best> friends .
    <always> , the $helper lived $home.at the $home.name with $hero .
    in the morning the $helper left $hero <gift> .
    whenever $hero heard $noise after that , $hero.he just <smiled> .
    <later> , $hero told everyone about the $helper $home.at the $home.name .
    " good night , $hero , " said the $helper <gladly> .
    <later> , the $helper came back with <gift> .
    <later> , $hero and the $helper <chatted> $home.at the $home.name .
    " you may stay $home.at the $home.name , " $hero told the $helper <gladly> .
    <later> , the $helper and $hero shared <snack> .

smiled
    smiled
    laughed
    waved
    yawned
"""
